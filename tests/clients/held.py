"""Sockets that are held while something happens to mesh: `held.py VIP PORT IDLE BUSY DATAGRAMS`.

Starts two echo servers, for TCP and UDP, and prints their ports. At the first line of its input it
connects to the VIP. From then on, for each line, it prints "all well", or what is wrong: an
echo that did not come, or a peer that is not the VIP. IDLE connections are used only then, BUSY
ones all the time; DATAGRAMS sockets are connected UDP, and as many unconnected.
"""

import resource
import selectors
import socket
import sys
import threading

vip, port, idle, busy, datagrams = sys.argv[1], *map(int, sys.argv[2:])
vip = (vip, port)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20000), hard))


def echo(tcp, udp):
    selector = selectors.DefaultSelector()
    selector.register(tcp, selectors.EVENT_READ)
    selector.register(udp, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is tcp:
                selector.register(tcp.accept()[0], selectors.EVENT_READ)
            elif key.fileobj is udp:
                udp.sendto(*udp.recvfrom(99))
            elif data := key.fileobj.recv(99):
                key.fileobj.sendall(data)
            else:
                selector.unregister(key.fileobj)
                key.fileobj.close()


ports = []
for _ in range(2):
    tcp = socket.create_server(("127.0.0.1", 0), backlog=500)
    ports.append(tcp.getsockname()[1])
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(tcp.getsockname())
    threading.Thread(target=echo, args=(tcp, udp), daemon=True).start()
print(*ports, flush=True)
if not sys.stdin.readline():
    sys.exit()


def datagram():
    s = socket.socket(type=socket.SOCK_DGRAM)
    s.settimeout(10)
    return s


streams = [socket.create_connection(vip, 10) for _ in range(idle)]
connected = [datagram() for _ in range(datagrams)]
for s in connected:
    s.connect(vip)
unconnected = [datagram() for _ in range(datagrams)]
rounds = 0


def through(s, text):
    try:
        if s in unconnected:
            s.sendto(text, vip)
            answer, source = s.recvfrom(99)
        else:
            s.sendall(text)
            answer, source = s.recv(99), s.getpeername()
    except OSError as error:
        return f"{s}: {error}"
    return None if (answer, source) == (text, vip) else f"{s}: {answer} from {source}"


def work(sockets):
    global rounds
    while True:
        for s in sockets:
            if fault := through(s, b"busy"):
                faults.append(fault)
                return
            rounds += 1


faults = []
if busy:
    at_work = [socket.create_connection(vip, 10) for _ in range(busy)]
    threading.Thread(target=work, args=(at_work,), daemon=True).start()
while True:
    for n, s in enumerate(streams + connected + unconnected):
        if fault := through(s, b"%d" % n):
            faults.append(fault)
    print(f"{len(faults)} faults: {faults[0]}" if faults else "all well", flush=True)
    if not sys.stdin.readline():
        break
print(rounds, "round trips of the busy ones", file=sys.stderr)
