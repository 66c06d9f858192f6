/* Closed-loop load with little cost of its own, the same for every front:
   `load SECONDS CONNECTIONS MAX_TOKENS STREAM PACE_US PORT...` -> one JSON line.

   Each connection sends a chat request, reads its answer to the end and sends the next, until the time is over; then
   running ones are read to their end. Prompts are unique. Connections go to the ports in turns and stay open unless the
   other side closes. The time to the first token ends with the first SSE event (or the body's first byte), the latency
   with the answer's last byte; a reconnection is part of both. Every answer is checked: status 200, and as many events
   with content as tokens were asked for. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { IN_BYTES = 1 << 18, MAX_CONNS = 1024, MAX_SAMPLES = 1 << 22 };
enum state { HEAD, LENGTH, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER, UNTIL_CLOSE };

struct conn {
    int fd, port, busy, fresh, status, closes, got, events, body_bytes;
    enum state state;
    long left; /* bytes of the body or chunk still to come */
    double sent, first;
    char in[IN_BYTES], line[1024];
    int in_len, line_len;
};

static struct conn *conns[MAX_CONNS];
static int stream, max_tokens, pace, n_ports, ports[64], poll_fd;
static double *ttft, *total, deadline;
static long n_done, n_errors, n_events, serial;
static char first_error[160];

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void dial(struct conn *c) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(c->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to)) {
        perror("connect");
        exit(1);
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event);
    c->fresh = 1;
}

static void hang_up(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

static void ask(struct conn *c) {
    static const char filler[] = "the quick brown fox jumps over the lazy dog and then walks home along the river";
    char body[1024], text[2048];
    int id = (int)serial++;
    int len = snprintf(body, sizeof body,
                       "{\"model\":\"bench\",\"messages\":[{\"role\":\"user\",\"content\":\"%08x %d-%ld pace=%d %s\"}],"
                       "\"max_tokens\":%d,\"temperature\":0%s}", (unsigned)id * 2654435761u, getpid(), (long)id, pace,
                       filler, max_tokens, stream ? ",\"stream\":true,\"stream_options\":{\"include_usage\":true}" : "");
    c->sent = now_s();
    if (c->fd < 0) dial(c);
    int size = snprintf(text, sizeof text,
                        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                        "Content-Length: %d\r\n\r\n%s", c->port, len, body);
    c->state = HEAD;
    c->busy = 1;
    c->first = 0;
    c->in_len = c->line_len = c->events = c->got = c->body_bytes = c->status = c->closes = 0;
    if (send(c->fd, text, size, MSG_NOSIGNAL) != size) c->closes = 1; /* the read that follows tells */
}

static void finish(struct conn *c, const char *error) {
    double end = now_s();
    c->busy = 0;
    if (!error && c->status != 200) error = "status";
    if (!error && c->events != (stream ? max_tokens : 1)) error = "events";
    if (error) {
        if (!n_errors++)
            snprintf(first_error, sizeof first_error, "%s: HTTP %d, %d events, %d bytes", error, c->status, c->events,
                     c->body_bytes);
        hang_up(c);
    } else {
        if (n_done < MAX_SAMPLES) {
            ttft[n_done] = c->first - c->sent;
            total[n_done] = end - c->sent;
        }
        n_done++;
        n_events += stream ? c->events + 3 : 0; /* and finish, usage, [DONE] */
        if (c->closes) hang_up(c);
    }
    if (end < deadline) ask(c);
}

/* Fronts that write the JSON anew may put a blank after the colon. */
static int has_content(const char *line) {
    const char *at = strstr(line, "\"content\":");
    return at && at[10 + strspn(at + 10, " ")] == '"' && at[11 + strspn(at + 10, " ")] == 'x';
}

/* Counts what a client would show: events with content. `line` keeps the start of a line that pieces may cut. */
static void see(struct conn *c, const char *data, long len) {
    if (!c->first && len) c->first = now_s();
    c->body_bytes += len;
    if (!stream) {
        c->events = 1;
        return;
    }
    for (long i = 0; i < len; i++) {
        if (data[i] != '\n') {
            if (c->line_len < (int)sizeof c->line - 1) c->line[c->line_len++] = data[i];
            continue;
        }
        c->line[c->line_len] = 0;
        if (!strncmp(c->line, "data: {", 7) && has_content(c->line)) c->events++;
        c->line_len = 0;
    }
}

static int read_head(struct conn *c) {
    char *end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
    if (!end) return 0;
    *end = 0;
    char *length = strcasestr(c->in, "\ncontent-length:");
    c->status = atoi(c->in + 9);
    c->closes |= strcasestr(c->in, "\nconnection: close") != NULL;
    c->left = length ? atol(length + 16) : 0;
    c->state = strcasestr(c->in, "\ntransfer-encoding:") ? CHUNK_SIZE : length ? LENGTH : UNTIL_CLOSE;
    return end + 4 - c->in;
}

/* Takes one step over `data`; returns the bytes used, 0 when more must come, -1 when the answer is whole. */
static long step(struct conn *c, char *data, long len) {
    char *end;
    long used;
    switch (c->state) {
    case HEAD: return read_head(c);
    case UNTIL_CLOSE: see(c, data, len); return len;
    case LENGTH:
    case CHUNK:
        used = len < c->left ? len : c->left;
        see(c, data, used);
        c->left -= used;
        if (c->left) return used;
        if (c->state == LENGTH) return -1;
        c->state = CHUNK_END;
        return used;
    default:
        end = memmem(data, len, "\r\n", 2);
        if (!end) return 0;
        used = end + 2 - data;
        if (c->state == CHUNK_END) c->state = CHUNK_SIZE;
        else if (c->state == TRAILER) return used == 2 ? -1 : used;
        else if (!(c->left = strtol(data, NULL, 16))) c->state = TRAILER;
        else c->state = CHUNK;
        return used;
    }
}

static void take(struct conn *c) {
    ssize_t got = recv(c->fd, c->in + c->in_len, IN_BYTES - 1 - c->in_len, 0);
    if (got <= 0) {
        int was_fresh = c->fresh, was_busy = c->busy;
        hang_up(c);
        if (!was_busy) return;
        if (c->state == UNTIL_CLOSE) finish(c, NULL);
        else if (!c->got && !was_fresh) { /* closed while it was idle: a client asks again */
            double sent = c->sent;
            ask(c);
            c->sent = sent;
        } else finish(c, "cut off");
        return;
    }
    c->got = 1;
    c->in_len += got;
    c->in[c->in_len] = 0;
    long at = 0, used = 0;
    while (at < c->in_len && (used = step(c, c->in + at, c->in_len - at)) > 0) at += used;
    c->in_len -= at;
    memmove(c->in, c->in + at, c->in_len);
    if (used < 0) {
        c->fresh = 0;
        finish(c, NULL);
    }
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void show(const char *name, double *values) {
    long n = n_done < MAX_SAMPLES ? n_done : MAX_SAMPLES;
    qsort(values, n, sizeof *values, by_size);
    printf(",\"%s_ms\":[%.4f,%.4f,%.4f]", name, n ? values[n / 2] * 1e3 : 0, n ? values[n * 95 / 100] * 1e3 : 0,
           n ? values[n * 99 / 100] * 1e3 : 0);
}

int main(int argc, char **argv) {
    if (argc < 7) return fprintf(stderr, "usage: load SECONDS CONNECTIONS MAX_TOKENS STREAM PACE_US PORT...\n"), 2;
    int n = atoi(argv[2]);
    max_tokens = atoi(argv[3]), stream = atoi(argv[4]), pace = atoi(argv[5]);
    for (int i = 6; i < argc && n_ports < 64; i++) ports[n_ports++] = atoi(argv[i]);
    poll_fd = epoll_create1(0);
    ttft = calloc(MAX_SAMPLES, sizeof *ttft), total = calloc(MAX_SAMPLES, sizeof *total);
    double start = now_s(), give_up;
    deadline = start + atof(argv[1]);
    give_up = deadline + 20;
    for (int i = 0; i < n && i < MAX_CONNS; i++) {
        conns[i] = calloc(1, sizeof **conns);
        conns[i]->fd = -1, conns[i]->port = ports[i % n_ports];
        ask(conns[i]);
    }
    struct epoll_event events[64];
    for (int running = 1; running && now_s() < give_up;) {
        int ready = epoll_wait(poll_fd, events, 64, 1000);
        for (int i = 0; i < ready; i++) take(events[i].data.ptr);
        running = 0;
        for (int i = 0; i < n; i++) running |= conns[i]->busy;
    }
    for (int i = 0; i < n; i++)
        if (conns[i]->busy) n_errors++, snprintf(first_error, sizeof first_error, "no answer for 20 s");
    printf("{\"requests\":%ld,\"errors\":%ld,\"events\":%ld,\"seconds\":%.4f,\"first_error\":\"%s\"", n_done, n_errors,
           n_events, now_s() - start, first_error);
    show("ttft", ttft);
    show("total", total);
    puts("}");
}
