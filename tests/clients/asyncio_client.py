"""Dials cells of the socket matrix with asyncio: `asyncio_client.py [KIND ADDRESS PORT]...`."""

import asyncio
import socket
import sys

IPPROTO_MPTCP = 262


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


async def talk(reader, writer):
    peer = writer.get_extra_info("peername")
    writer.write(b"?")
    answer = await reader.read()
    writer.close()
    return answer, peer


async def tcp(address, port):
    return await talk(*await asyncio.open_connection(address, port))


async def mptcp(address, port):
    # asyncio makes none, and cannot dial one: it asks getaddrinfo, which does not know MPTCP.
    s = socket.socket(family(address), socket.SOCK_STREAM, IPPROTO_MPTCP)
    s.connect((address, port))
    return await talk(*await asyncio.open_connection(sock=s))


class Hearing(asyncio.DatagramProtocol):
    def __init__(self):
        self.heard = asyncio.get_running_loop().create_future()

    def datagram_received(self, data, source):
        self.heard.set_result((data, source))


async def udp_connected(address, port):
    loop = asyncio.get_running_loop()
    transport, hearing = await loop.create_datagram_endpoint(Hearing, remote_addr=(address, port))
    peer = transport.get_extra_info("peername")
    transport.sendto(b"?")
    answer, source = await hearing.heard
    transport.close()
    return answer, peer, source


async def udp_unconnected(address, port):
    loop = asyncio.get_running_loop()
    transport, hearing = await loop.create_datagram_endpoint(Hearing, family=family(address))
    transport.sendto(b"?", (address, port))
    answer, source = await hearing.heard
    transport.close()
    return answer, source


KINDS = {"tcp": tcp, "mptcp": mptcp, "udp-connected": udp_connected, "udp-unconnected": udp_unconnected}


async def main(words):
    for kind, address, port in zip(words[::3], words[1::3], words[2::3]):
        answer, *peers = await KINDS[kind](address, int(port))
        print(answer.decode(), *(word for peer in peers for word in peer[:2]))


asyncio.run(main(sys.argv[1:]))
