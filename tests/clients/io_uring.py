"""Connects by io_uring (`io_uring.py ADDRESS PORT`), and prints the peer and what it sends.

Python has no io_uring, so this speaks to the kernel itself: one entry, submitted and waited for.
"""

import ctypes
import mmap
import os
import socket
import struct
import sys

IO_URING_SETUP, IO_URING_ENTER = 425, 426
ENTRIES, ENTRY, COMPLETION = 1, 64, 16
OFFSET_ENTRIES = 0x10000000
CONNECT, WAIT = 16, 1

kernel = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    result = kernel.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# struct io_uring_params: ten words, then the offsets of the submission and the completion queue.
params = (ctypes.c_uint32 * 30)()
ring = call(IO_URING_SETUP, ENTRIES, params)
submission, completion = params[10:20], params[20:30]
tail_at, array_at, completions_at = submission[1], submission[6], completion[5]
size = max(array_at + 4 * params[0], completions_at + COMPLETION * params[1])
queues = mmap.mmap(ring, size)
entries = mmap.mmap(ring, ENTRY * params[0], offset=OFFSET_ENTRIES)

host, port = sys.argv[1], int(sys.argv[2])
s = socket.socket()
address = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, socket.inet_aton(host))
buffer = ctypes.create_string_buffer(address, len(address))
# Opcode, flags, priority, socket; then the address' length and place.
entries[:24] = struct.pack("=BBHiQQ", CONNECT, 0, 0, s.fileno(), len(address), ctypes.addressof(buffer))
queues[array_at : array_at + 4] = struct.pack("=I", 0)
queues[tail_at : tail_at + 4] = struct.pack("=I", 1)
call(IO_URING_ENTER, ring, 1, 1, WAIT, None, 0)
_, result, _ = struct.unpack("=QiI", queues[completions_at : completions_at + COMPLETION])
if result < 0:
    raise OSError(-result, os.strerror(-result))
s.settimeout(5)
print(s.getpeername(), s.recv(9).decode())
