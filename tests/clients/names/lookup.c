// The C library's resolver: the address of each name in a family, as "name 4 name 6 …".
#include <netdb.h>
#include <stdio.h>
#include <arpa/inet.h>
#include <sys/socket.h>

static const char *word(int error) {
    switch (error) {
    case EAI_NONAME: return "EAI_NONAME";
#ifdef EAI_NODATA
    case EAI_NODATA: return "EAI_NODATA";
#endif
    case EAI_AGAIN: return "EAI_AGAIN";
    default: return gai_strerror(error);
    }
}

int main(int argc, char **argv) {
    for (int i = 1; i + 1 < argc; i += 2) {
        struct addrinfo hints = {.ai_family = argv[i + 1][0] == '6' ? AF_INET6 : AF_INET}, *found;
        char address[64];
        int error = getaddrinfo(argv[i], "80", &hints, &found);
        if (!error)
            error = getnameinfo(found->ai_addr, found->ai_addrlen, address, sizeof address, 0, 0, NI_NUMERICHOST);
        puts(error ? word(error) : address);
    }
}
