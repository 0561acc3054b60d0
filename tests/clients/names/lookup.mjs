// Node's two resolvers, "lookup" and "resolve": the address of each name in a family, as "name 4 name 6 …".
import dns from "node:dns/promises";

const [how, ...questions] = process.argv.slice(2);
for (let i = 0; i + 1 < questions.length; i += 2) {
  const [name, family] = [questions[i], Number(questions[i + 1])];
  try {
    console.log(
      how === "lookup" ? (await dns.lookup(name, { family })).address
        : (await (family === 6 ? dns.resolve6 : dns.resolve4)(name))[0],
    );
  } catch (error) {
    console.log(error.code);
  }
}
