// Dials cells of the socket matrix through libc or io_uring: `sockets HOW [KIND ADDRESS PORT]...`.
//
// HOW is `libc`, or for io_uring `inline`, `workers` (each operation is handed to the kernel's
// worker threads) or `poller` (a kernel thread takes the operations from the ring).

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <liburing.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

static struct io_uring ring;
static int uses_ring, entry_flags;

static int must(const char *what, int result)
{
    if (result < 0)
        errx(1, "%s: %s", what, strerror(-result));
    return result;
}

static int libc(const char *what, int result)
{
    return must(what, result < 0 ? -errno : result);
}

static int completed(const char *what, struct io_uring_sqe *entry)
{
    struct io_uring_cqe *completion;
    io_uring_sqe_set_flags(entry, entry_flags);
    must("submit", io_uring_submit(&ring));
    must("wait", io_uring_wait_cqe(&ring, &completion));
    int result = completion->res;
    io_uring_cqe_seen(&ring, completion);
    return must(what, result);
}

static int open_socket(int family, int type, int protocol)
{
    if (!uses_ring)
        return libc("socket", socket(family, type, protocol));
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
    io_uring_prep_socket(entry, family, type, protocol, 0);
    return completed("socket", entry);
}

static void dial(int fd, const struct sockaddr *address, socklen_t length)
{
    if (!uses_ring) {
        libc("connect", connect(fd, address, length));
        return;
    }
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
    io_uring_prep_connect(entry, fd, address, length);
    completed("connect", entry);
}

static void ask(int fd)
{
    if (!uses_ring) {
        libc("send", send(fd, "?", 1, 0));
        return;
    }
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
    io_uring_prep_send(entry, fd, "?", 1, 0);
    completed("send", entry);
}

static int hear(int fd, char *answer, int size)
{
    if (!uses_ring)
        return libc("recv", recv(fd, answer, size, 0));
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
    io_uring_prep_recv(entry, fd, answer, size, 0);
    return completed("recv", entry);
}

static void ask_at(int fd, struct msghdr *message)
{
    if (!uses_ring) {
        libc("sendmsg", sendmsg(fd, message, 0));
        return;
    }
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
    io_uring_prep_sendmsg(entry, fd, message, 0);
    completed("sendmsg", entry);
}

static int hear_from(int fd, struct msghdr *message)
{
    if (!uses_ring)
        return libc("recvmsg", recvmsg(fd, message, 0));
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
    io_uring_prep_recvmsg(entry, fd, message, 0);
    return completed("recvmsg", entry);
}

static socklen_t parse(const char *address, int port, struct sockaddr_storage *into)
{
    memset(into, 0, sizeof *into);
    struct sockaddr_in *four = (void *)into;
    struct sockaddr_in6 *six = (void *)into;
    if (inet_pton(AF_INET, address, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons(port);
        return sizeof *four;
    }
    if (inet_pton(AF_INET6, address, &six->sin6_addr) != 1)
        errx(1, "%s is no address", address);
    six->sin6_family = AF_INET6;
    six->sin6_port = htons(port);
    return sizeof *six;
}

static void print(const char *answer, int length, const struct sockaddr_storage *peer)
{
    char text[INET6_ADDRSTRLEN];
    const struct sockaddr_in *four = (const void *)peer;
    const struct sockaddr_in6 *six = (const void *)peer;
    const void *address = peer->ss_family == AF_INET ? (void *)&four->sin_addr : (void *)&six->sin6_addr;
    int port = ntohs(peer->ss_family == AF_INET ? four->sin_port : six->sin6_port);
    printf("%.*s %s %d\n", length, answer, inet_ntop(peer->ss_family, address, text, sizeof text), port);
}

static void cell(const char *kind, const char *address, int port)
{
    struct sockaddr_storage vip, peer;
    socklen_t length = parse(address, port, &vip), peer_length = sizeof peer;
    int is_datagram = strncmp(kind, "udp", 3) == 0;
    int protocol = strcmp(kind, "mptcp") == 0 ? IPPROTO_MPTCP : 0;
    int fd = open_socket(vip.ss_family, is_datagram ? SOCK_DGRAM : SOCK_STREAM, protocol);
    char answer[16];
    int heard;
    if (strcmp(kind, "udp-unconnected") == 0) {
        struct iovec question = {"?", 1}, room = {answer, sizeof answer};
        struct msghdr out = {.msg_name = &vip, .msg_namelen = length, .msg_iov = &question, .msg_iovlen = 1};
        struct msghdr in = {.msg_name = &peer, .msg_namelen = peer_length, .msg_iov = &room, .msg_iovlen = 1};
        ask_at(fd, &out);
        heard = hear_from(fd, &in);
    } else {
        dial(fd, (struct sockaddr *)&vip, length);
        libc("getpeername", getpeername(fd, (struct sockaddr *)&peer, &peer_length));
        ask(fd);
        heard = hear(fd, answer, sizeof answer);
    }
    print(answer, heard, &peer);
    close(fd);
}

int main(int count, char **words)
{
    const char *how = count > 1 ? words[1] : "";
    uses_ring = strcmp(how, "libc") != 0;
    if (uses_ring) {
        entry_flags = strcmp(how, "workers") == 0 ? IOSQE_ASYNC : 0;
        must("io_uring", io_uring_queue_init(8, &ring, strcmp(how, "poller") == 0 ? IORING_SETUP_SQPOLL : 0));
    }
    for (int at = 2; at + 2 < count; at += 3)
        cell(words[at], words[at + 1], atoi(words[at + 2]));
    return 0;
}
