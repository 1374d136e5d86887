// tq_ggml_rpc.cpp: see tq_ggml_rpc.h.
#include "tq_ggml_rpc.h"

#include "ggml-impl.h"
#include "ggml-rpc.h"

#include <map>
#include <mutex>
#include <string>

#ifdef _WIN32
#    include <winsock2.h>
#else
#    include <netinet/in.h>
#    include <netinet/tcp.h>
#    include <sys/socket.h>
#endif

namespace {

struct counts {
    int32_t lost = 0;
    int32_t alive = 0;
};

std::mutex mutex;

// Never destroyed: the client's threads may outlive the statics of this file.
std::map<std::string, counts> & connections() {
    static auto * all = new std::map<std::string, counts>;
    return *all;
}

void set(intptr_t socket, int level, int name, int value) {
    // A system that refuses waits longer for a peer that is gone.
    (void) setsockopt(socket, level, name, (const char *) &value, sizeof(value));
}

}  // namespace

void tq_ggml_rpc_connected(const char * endpoint) {
    std::lock_guard<std::mutex> lock(mutex);
    connections()[endpoint].alive++;
}

void tq_ggml_rpc_lost(const char * endpoint) {
    GGML_LOG_ERROR("rpc: the connection to worker %s is lost\n", endpoint);
    std::lock_guard<std::mutex> lock(mutex);
    connections()[endpoint].alive--;
    connections()[endpoint].lost++;
}

void tq_ggml_rpc_closed(const char * endpoint, bool lost) {
    std::lock_guard<std::mutex> lock(mutex);
    connections()[endpoint].alive -= !lost;
}

void tq_ggml_rpc_watch(intptr_t socket) {
    const int idle = 10, interval = 5, probes = 3;
    static_assert(idle + interval * probes == TQ_GGML_RPC_SILENCE, "the header says otherwise");
    set(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef __linux__
    set(socket, IPPROTO_TCP, TCP_KEEPIDLE, idle);
    set(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, 1000 * TQ_GGML_RPC_SILENCE);  // of data that nobody acknowledges
#endif
#ifdef __APPLE__
    set(socket, IPPROTO_TCP, TCP_KEEPALIVE, idle);
    set(socket, SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
#if defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
    set(socket, IPPROTO_TCP, TCP_KEEPINTVL, interval);
    set(socket, IPPROTO_TCP, TCP_KEEPCNT, probes);
#endif
}

uint32_t tq_ggml_rpc_protocol(void) {
    return (uint32_t) RPC_PROTO_MAJOR_VERSION << 24 | RPC_PROTO_MINOR_VERSION << 16 | RPC_PROTO_PATCH_VERSION << 8 |
           TQ_GGML_RPC_VERSION;
}

int32_t tq_ggml_rpc_n_lost(const char * endpoint) {
    std::lock_guard<std::mutex> lock(mutex);
    return connections()[endpoint].lost;
}

int32_t tq_ggml_rpc_n_alive(const char * endpoint) {
    std::lock_guard<std::mutex> lock(mutex);
    return connections()[endpoint].alive;
}
