//! Names in resolvers that nobody here wrote, in a task whose resolv.conf names somebody else's name server.

use std::{path::Path, process::Command};

use mesh_tests::{documents, done, text};

use crate::intercept::{Place, UPSTREAM, VIP};

const CLIENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/names");

/// What is asked for: a title, a name, a family of addresses.
const QUESTIONS: [[&str; 3]; 5] = [
    ["service", "echo.service.local", "4"],
    ["alias", "short", "4"],
    ["outside", "elsewhere.test", "4"],
    ["no such name", "nobody.service.local", "4"],
    ["AAAA where there is only A", "echo.service.local", "6"],
];

/// A resolver, what starts it, and its own words for a name that does not exist and for one without an
/// address of the family.
struct Resolver {
    title: &'static str,
    start: Vec<String>,
    environment: Vec<(&'static str, String)>,
    nobody: &'static str,
    nothing: &'static str,
    /// What it says for the VIP.
    vip: String,
}

impl Resolver {
    fn new(title: &'static str, start: &[&str], [nobody, nothing]: [&'static str; 2]) -> Self {
        let start = start.iter().copied().map(str::to_owned).collect();
        Self { title, start, environment: Vec::new(), nobody, nothing, vip: VIP.into() }
    }

    fn with(mut self, key: &'static str, value: &str) -> Self {
        self.environment.push((key, value.into()));
        self
    }

    fn expected(&self) -> [&str; 5] {
        [&self.vip, &self.vip, UPSTREAM, self.nobody, self.nothing]
    }
}

fn resolvers(dir: &Path) -> Vec<Resolver> {
    let source = |name: &str| format!("{CLIENTS}/{name}");
    let built = |name: &str| dir.join(name).display().to_string();
    let [glibc, musl, go] = ["glibc", "musl", "go"].map(built);
    for (compiler, program) in [("gcc", &glibc), ("musl-gcc", &musl)] {
        let mut build = Command::new(compiler);
        done(build.args(["-Wall", "-Werror", "-D_GNU_SOURCE", "-o", program, &source("lookup.c")]));
    }
    let mut build = Command::new("go");
    build.args(["build", "-o", &go, &source("lookup.go")]).current_dir(dir);
    build.env("GO111MODULE", "off").env("GOPATH", dir).env("CGO_ENABLED", "1");
    done(build.env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("go")));

    let glibc_s = ["EAI_NONAME", "EAI_NODATA"];
    let node = |how| ["node".to_owned(), source("lookup.mjs"), how];
    let script = |name: &str| ["sh".to_owned(), source(name)];
    let dig = |title, options: &str| {
        let start = script("dig.sh");
        let words = ["NXDOMAIN", "NOERROR, no records"];
        Resolver::new(title, &start.each_ref().map(|word| &**word), words).with("DIG", options)
    };
    let scripted =
        |title, name: &str, words| Resolver::new(title, &script(name).each_ref().map(|word| &**word), words);
    let mut curl = scripted("curl", "curl.sh", ["exit code 6", "exit code 7"]);
    curl.vip += ", served";
    let mut nginx = scripted("nginx `resolver`", "nginx.sh", ["Host not found", "served"]);
    nginx.vip = "served".into();
    vec![
        Resolver::new("glibc `getaddrinfo`", &[&glibc], glibc_s),
        scripted("glibc, `getent ahosts`", "getent.sh", ["exit code 2", "::ffff:127.128.28.1"]),
        Resolver::new("musl `getaddrinfo`", &[&musl], ["EAI_NONAME"; 2]),
        Resolver::new(
            "Node `lookup`",
            &node("lookup".into()).each_ref().map(|word| &**word),
            ["ENOTFOUND"; 2],
        ),
        Resolver::new(
            "Node `resolve4` (c-ares)",
            &node("resolve".into()).each_ref().map(|word| &**word),
            ["ENOTFOUND", "ENODATA"],
        ),
        Resolver::new(
            "Java `InetAddress`",
            &["java", &source("Lookup.java")],
            ["UnknownHostException", "no such address"],
        ),
        Resolver::new("Go, its own", &[&go], ["no such host"; 2]).with("GODEBUG", "netdns=go"),
        Resolver::new("Go, cgo", &[&go], ["no such host", "no suitable address found"])
            .with("GODEBUG", "netdns=cgo"),
        Resolver::new("dnspython", &["/usr/bin/python3", &source("lookup.py")], ["NXDOMAIN", "NoAnswer"]),
        scripted("busybox `nslookup`", "nslookup.sh", ["NXDOMAIN", "no answer"]),
        dig("dig", "+notcp"),
        dig("dig `+tcp`", "+tcp"),
        curl,
        nginx.with("DIR", &dir.display().to_string()),
    ]
}

#[test]
fn every_resolver_hears_the_daemon_whichever_name_server_it_asks() {
    let place = Place::start();
    let host = place.host();
    let resolvers = resolvers(place.mesh.dir.path());
    let before = place.original.asked().len();
    let mut table = format!("| resolver | {} |\n", QUESTIONS.map(|[title, ..]| title).join(" | "));
    table += &format!("|---|{}\n", "---|".repeat(QUESTIONS.len()));
    let mut wrong = Vec::new();
    for resolver in &resolvers {
        for server in [&place.resolver.address, &place.resolver.address6] {
            let in_brackets = if server.contains(':') { format!("[{server}]") } else { server.clone() };
            let mut client = place.command_asking(server, &host, "timeout");
            client.arg("60").args(&resolver.start).args(QUESTIONS.iter().flat_map(|[_, rest @ ..]| rest));
            client.envs(resolver.environment.iter().cloned()).env("SERVER", in_brackets);
            let output = client.output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            if said.lines().ne(resolver.expected()) {
                wrong.push(format!("{} asks {server}: {}", resolver.title, text(&output)));
            }
        }
        let cells = resolver.expected().map(|word| word.replace(VIP, "VIP").replace(UPSTREAM, "upstream's"));
        table += &format!("| {} | {} |\n", resolver.title, cells.join(" | "));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(place.original.asked().len(), before, "somebody was asked who stands in resolv.conf");
    documents("names.md", &table);
}
