// Dials cells of the socket matrix with Node: `client.mjs [KIND ADDRESS PORT]...`.
//
// Node makes no MPTCP sockets; under `mptcpize run` all its TCP sockets are that.

import dgram from "node:dgram";
import net from "node:net";
import { once } from "node:events";

async function tcp(address, port) {
  const socket = net.connect({ host: address, port });
  await once(socket, "connect");
  const peer = [socket.remoteAddress, socket.remotePort];
  socket.write("?");
  const [answer] = await once(socket, "data");
  socket.destroy();
  return [answer, ...peer];
}

function udp(address) {
  return dgram.createSocket(net.isIPv6(address) ? "udp6" : "udp4");
}

async function udpConnected(address, port) {
  const socket = udp(address);
  socket.connect(port, address);
  await once(socket, "connect");
  const peer = socket.remoteAddress();
  socket.send("?");
  const [answer, source] = await once(socket, "message");
  socket.close();
  return [answer, peer.address, peer.port, source.address, source.port];
}

async function udpUnconnected(address, port) {
  const socket = udp(address);
  socket.send("?", port, address);
  const [answer, source] = await once(socket, "message");
  socket.close();
  return [answer, source.address, source.port];
}

const kinds = { tcp, mptcp: tcp, "udp-connected": udpConnected, "udp-unconnected": udpUnconnected };
const words = process.argv.slice(2);
for (let at = 0; at < words.length; at += 3) {
  const [kind, address, port] = words.slice(at, at + 3);
  console.log((await kinds[kind](address, Number(port))).join(" "));
}
