/* no_network.c: a library for LD_PRELOAD that lets a process, Python and native code alike, reach this machine only: every
 * attempt to reach or look up another one fails and is written to the file TQGGUF_NETWORK_LOG (tests/integration/test_network.py). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char * call, const char * where) {
    char line[512];
    const int n = snprintf(line, sizeof(line), "%s %s\n", call, where);
    const int file = open(getenv("TQGGUF_NETWORK_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (file < 0 || write(file, line, n) != n) {
        abort(); /* an attempt that is not noted would be none */
    }
    close(file);
}

static int is_here(const char * call, const struct sockaddr * address) {
    char text[INET6_ADDRSTRLEN] = "?";
    if (address == NULL || address->sa_family == AF_UNIX || address->sa_family == AF_NETLINK) {
        return 1;
    }
    if (address->sa_family == AF_INET) {
        const struct in_addr ip = ((const struct sockaddr_in *) address)->sin_addr;
        if (ntohl(ip.s_addr) >> 24 == 127) {
            return 1;
        }
        inet_ntop(AF_INET, &ip, text, sizeof(text));
    } else if (address->sa_family == AF_INET6) {
        const struct in6_addr ip = ((const struct sockaddr_in6 *) address)->sin6_addr;
        if (IN6_IS_ADDR_LOOPBACK(&ip)) {
            return 1;
        }
        inet_ntop(AF_INET6, &ip, text, sizeof(text));
    }
    note(call, text);
    errno = ENETUNREACH;
    return 0;
}

int connect(int socket, const struct sockaddr * address, socklen_t length) {
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    return is_here("connect", address) ? next(socket, address, length) : -1;
}

ssize_t sendto(int socket, const void * data, size_t n, int flags, const struct sockaddr * address, socklen_t length) {
    ssize_t (*next)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    return is_here("sendto", address) ? next(socket, data, n, flags, address, length) : -1;
}

int getaddrinfo(const char * host, const char * service, const struct addrinfo * hints, struct addrinfo ** found) {
    int (*next)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    if (host != NULL && strcmp(host, "127.0.0.1") != 0 && strcmp(host, "localhost") != 0 && strcmp(host, "::1") != 0) {
        note("getaddrinfo", host);
        return EAI_FAIL;
    }
    return next(host, service, hints, found);
}
