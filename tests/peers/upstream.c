/* An engine that costs next to nothing, so that only the front shows: `upstream PORT` (0: a free one, printed).

   Answers llama-server's chat route at once: one canned object, or as many SSE events as `max_tokens` says, each in a
   write of its own. A prompt that holds `pace=N` gets an event every N microseconds. Routes that routers probe answer
   too. One thread, epoll, keep-alive. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FDS = 4096, IN_BYTES = 1 << 20, OUT_BYTES = 1 << 14 };

struct conn {
    char *in;
    int in_len, out_len, out_off;
    int left;           /* events still to be sent, the last two (finish and usage) and the end included; 0: none */
    int total, paced;   /* content events of this answer; microseconds between them */
    int with_timings, with_probs;
    long long due;      /* when the next event is to go out, microseconds */
    char out[OUT_BYTES];
};

static struct conn *conns[MAX_FDS];
static int active[MAX_FDS], n_active;

static long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static const char TIMINGS[] =
    "\"timings\":{\"cache_n\":0,\"prompt_n\":64,\"prompt_ms\":1.0,\"prompt_per_token_ms\":0.01,"
    "\"prompt_per_second\":64000.0,\"predicted_n\":%d,\"predicted_ms\":1.0,\"predicted_per_token_ms\":0.01,"
    "\"predicted_per_second\":64000.0}";
static const char PROBS[] =
    ",\"logprobs\":{\"content\":[{\"id\":120,\"token\":\"x\",\"bytes\":[120],\"prob\":0.6001168489456177,"
    "\"top_probs\":[{\"id\":120,\"token\":\"x\",\"bytes\":[120],\"prob\":0.6001168489456177}]}]}";
static const char IDENTITY[] =
    "\"created\":1763720000,\"id\":\"chatcmpl-Ai9BchTbWmNPv0yJr9nWzQ0YcKpXJmZt\",\"model\":\"bench\","
    "\"system_fingerprint\":\"b1\"";

static void drop(int fd) {
    for (int i = 0; i < n_active; i++)
        if (active[i] == fd) active[i--] = active[--n_active];
    free(conns[fd]->in);
    free(conns[fd]);
    conns[fd] = NULL;
    close(fd);
}

/* What the socket does not take waits in `out`; nothing new is made before it is gone. Returns -1 when it is broken. */
static int put(int fd, const char *data, int len) {
    struct conn *c = conns[fd];
    ssize_t sent = c->out_len ? 0 : send(fd, data, len, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN) return -1;
        sent = 0;
    }
    if (c->out_len + len - sent > OUT_BYTES) return -1;
    memcpy(c->out + c->out_len, data + sent, len - sent);
    c->out_len += len - sent;
    return 0;
}

static int put_whole(int fd, int status, const char *type, const char *body) {
    char text[4096];
    int len = snprintf(text, sizeof text,
                       "HTTP/1.1 %d %s\r\nServer: upstream\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s", status,
                       status == 200 ? "OK" : "Not Found", type,
                       strlen(body), body);
    return put(fd, text, len);
}

static int put_chunk(int fd, const char *body) {
    char text[4096];
    int len = snprintf(text, sizeof text, "%zx\r\n%s\r\n", strlen(body), body);
    return put(fd, text, len);
}

static int put_event(int fd) {
    struct conn *c = conns[fd];
    char timings[512], text[2048];
    int place = c->total + 3 - c->left;
    c->left--;
    if (c->left == 0) return put_chunk(fd, "data: [DONE]\n\n") || put(fd, "0\r\n\r\n", 5);
    snprintf(timings, sizeof timings, TIMINGS, place);
    if (c->left == 2)
        snprintf(text, sizeof text,
                 "data: {\"choices\":[{\"finish_reason\":\"length\",\"index\":0,\"delta\":{}}],%s,\"object\":"
                 "\"chat.completion.chunk\"}\n\n", IDENTITY);
    else if (c->left == 1)
        snprintf(text, sizeof text,
                 "data: {\"choices\":[],%s,\"object\":\"chat.completion.chunk\",\"usage\":{\"completion_tokens\":%d,"
                 "\"prompt_tokens\":64,\"total_tokens\":%d,\"prompt_tokens_details\":{\"cached_tokens\":0}},%s}\n\n",
                 IDENTITY, c->total, c->total + 64, timings);
    else
        snprintf(text, sizeof text,
                 "data: {\"choices\":[{\"finish_reason\":null,\"index\":0,\"delta\":{%s\"content\":\"x\"}%s}],%s,\"object\":"
                 "\"chat.completion.chunk\"%s%s}\n\n", place == 0 ? "\"role\":\"assistant\"," : "",
                 c->with_probs ? PROBS : "", IDENTITY, c->with_timings ? "," : "", c->with_timings ? timings : "");
    return put_chunk(fd, text);
}

static int number_after(const char *text, const char *name, int otherwise) {
    const char *at = strstr(text, name);
    return at ? atoi(at + strlen(name) + strspn(at + strlen(name), " :=")) : otherwise;
}

static int is_on(const char *text, const char *name) {
    const char *at = strstr(text, name);
    return at && !strncmp(at + strlen(name) + strspn(at + strlen(name), " :"), "true", 4);
}

static int generate(int fd, const char *body) {
    struct conn *c = conns[fd];
    char timings[512], text[2048];
    c->total = number_after(body, "\"max_tokens\"", 0);
    if (c->total < 1) c->total = number_after(body, "\"max_completion_tokens\"", 1); /* what some routers make of it */
    if (is_on(body, "\"stream\"")) {
        c->left = c->total + 3;
        c->paced = number_after(body, "pace=", 0);
        c->with_timings = is_on(body, "\"timings_per_token\"");
        c->with_probs = is_on(body, "\"post_sampling_probs\"");
        c->due = now_us() + c->paced;
        active[n_active++] = fd;
        static const char head[] = "HTTP/1.1 200 OK\r\nServer: upstream\r\nContent-Type: text/event-stream\r\n"
                                   "Transfer-Encoding: chunked\r\n\r\n";
        return put(fd, head, sizeof head - 1);
    }
    snprintf(timings, sizeof timings, TIMINGS, c->total);
    snprintf(text, sizeof text,
             "{\"choices\":[{\"finish_reason\":\"length\",\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
             "\"x\"}}],%s,\"object\":\"chat.completion\",\"usage\":{\"completion_tokens\":%d,\"prompt_tokens\":64,"
             "\"total_tokens\":%d,\"prompt_tokens_details\":{\"cached_tokens\":0}},%s}", IDENTITY, c->total,
             c->total + 64, timings);
    return put_whole(fd, 200, "application/json; charset=utf-8", text);
}

static int is_route(const char *head, const char *route) {
    const char *target = strchr(head, ' ') + 1;
    size_t len = strlen(route);
    return !strncmp(target, route, len) && strchr(" ?", target[len]);
}

/* As llama-server: what it does not know is 404. Routers try other servers' routes on every request. */
static int answer(int fd, char *head, const char *body) {
    const char *json = "application/json; charset=utf-8";
    if (!strchr(head, ' ')) return -1; /* HTTP/2 tried on us, for one */
    if (is_route(head, "/v1/chat/completions")) return generate(fd, body);
    if (is_route(head, "/v1/models") || is_route(head, "/models"))
        return put_whole(fd, 200, json,
                         "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1763720000,"
                         "\"owned_by\":\"llamacpp\",\"meta\":{}}]}");
    if (is_route(head, "/metrics")) return put_whole(fd, 200, "text/plain; version=0.0.4", "llamacpp:requests_processing 0\n");
    if (is_route(head, "/slots")) return put_whole(fd, 200, json, "[]");
    if (is_route(head, "/tokenize")) return put_whole(fd, 200, json, "{\"tokens\":[1,2,3]}");
    if (is_route(head, "/health")) return put_whole(fd, 200, json, "{\"status\":\"ok\"}");
    if (is_route(head, "/props"))
        return put_whole(fd, 200, json, "{\"default_generation_settings\":{\"n_ctx\":8192},\"total_slots\":64,"
                                        "\"model_path\":\"bench\",\"chat_template\":\"\"}");
    return put_whole(fd, 404, json,
                     "{\"error\":{\"code\":404,\"message\":\"File Not Found\",\"type\":\"not_found_error\"}}");
}

/* Serves whole requests from `in`, one after the other; a stream must have ended before the next. */
static int serve(int fd) {
    struct conn *c = conns[fd];
    char *end;
    while (!c->left && (end = memmem(c->in, c->in_len, "\r\n\r\n", 4))) {
        *end = 0;
        char *length = strcasestr(c->in, "\ncontent-length:");
        int head_len = end + 4 - c->in, body_len = length ? atoi(length + 16) : 0;
        if (head_len + body_len > c->in_len) {
            *end = '\r';
            return 0;
        }
        char kept = c->in[head_len + body_len];
        c->in[head_len + body_len] = 0;
        if (answer(fd, c->in, c->in + head_len)) return -1;
        c->in[head_len + body_len] = kept;
        c->in_len -= head_len + body_len;
        memmove(c->in, c->in + head_len + body_len, c->in_len);
    }
    return 0;
}

static int take(int fd) {
    struct conn *c = conns[fd];
    ssize_t got = recv(fd, c->in + c->in_len, IN_BYTES - 1 - c->in_len, 0);
    if (got < 0) return errno == EAGAIN ? 0 : -1;
    if (got == 0) return -1;
    c->in_len += got;
    return serve(fd);
}

static int flush_out(int fd) {
    struct conn *c = conns[fd];
    while (c->out_off < c->out_len) {
        ssize_t sent = send(fd, c->out + c->out_off, c->out_len - c->out_off, MSG_NOSIGNAL);
        if (sent < 0) return errno == EAGAIN ? 0 : -1;
        c->out_off += sent;
    }
    c->out_off = c->out_len = 0;
    return 0;
}

/* One event of each stream that is due, in turns, as an engine with a batch of slots would. */
static long long emit_due(void) {
    long long now = now_us(), next = -1;
    for (int i = 0; i < n_active; i++) {
        int fd = active[i];
        struct conn *c = conns[fd];
        if (c->out_len) continue; /* the reader is slow */
        if (c->paced && c->due > now) {
            if (next < 0 || c->due < next) next = c->due;
            continue;
        }
        c->due += c->paced;
        int broken = put_event(fd);
        if (!broken && c->left <= 2 && c->paced) c->due = now; /* finish, usage and end follow the last token at once */
        if (broken) {
            drop(fd);
            i--;
        } else if (!c->left) {
            active[i--] = active[--n_active];
            if (serve(fd)) drop(fd);
        } else if (!c->paced || c->due <= now) {
            next = now;
        } else if (next < 0 || c->due < next) {
            next = c->due;
        }
    }
    return next;
}

static void welcome(int listener, int poll) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (fd >= MAX_FDS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        conns[fd] = calloc(1, sizeof **conns);
        conns[fd]->in = malloc(IN_BYTES);
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET | EPOLLRDHUP, .data.fd = fd};
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
    }
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poll = epoll_create1(0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 1024)) return perror("bind"), 1;
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[256];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        long long next = emit_due(), wait = next < 0 ? -1 : next - now_us();
        struct timespec timeout = {.tv_sec = wait > 0 ? wait / 1000000 : 0, .tv_nsec = wait > 0 ? wait % 1000000 * 1000 : 0};
        int n = epoll_pwait2(poll, events, 256, next < 0 ? NULL : &timeout, NULL);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) welcome(listener, poll);
            else if ((events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP) && take(fd)) || flush_out(fd)) drop(fd);
        }
    }
}
