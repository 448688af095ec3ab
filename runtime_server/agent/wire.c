/* The connection to the server: frames in and out through two bounded buffers.
 *
 * A frame is u32le length of the rest, u8 kind, u32le id, payload. Whoever breaks the rules is hung up on.
 * Nothing is read while the out buffer has no room for a reply, so a server that stops reading stops us
 * from taking work, and nothing grows. We connect, the server listens: code in the sandbox finds nothing
 * to talk to. While no server has welcomed us the orphan clock runs; when it ends, everything ends.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define OUT_SIZE (160u * 1024u)
#define IN_SIZE (64u * 1024u)
#define BACKOFF_FIRST_US 20000
#define BACKOFF_LAST_US 1000000

static int sock = -1;
static bool welcomed;
uint32_t push_left;
static uint32_t interest;
static struct sockaddr_un address = {.sun_family = AF_UNIX}; /* a name in `folder` */
static int folder = -1;
static int64_t orphan_us, orphan_at, retry_at, backoff = BACKOFF_FIRST_US;
static unsigned char out[OUT_SIZE], *in;
static size_t out_from, out_to, in_size, in_to;

size_t wire_room(void) {
    size_t taken = out_to - out_from;
    return sock < 0 || OUT_SIZE - taken < HEADER ? 0 : OUT_SIZE - taken - HEADER;
}

/* Where to put a payload of at most `room` bytes; the caller has asked wire_room. */
unsigned char *wire_begin(size_t room) {
    if (OUT_SIZE - out_to < room + HEADER) {
        memmove(out, out + out_from, out_to - out_from);
        out_to -= out_from;
        out_from = 0;
    }
    return out + out_to + HEADER;
}

void wire_commit(enum kind kind, uint32_t id, size_t size) {
    unsigned char *at = put32(out + out_to, (uint32_t)(HEADER - 4 + size));
    *at++ = (unsigned char)kind;
    put32(at, id);
    out_to += HEADER + size;
}

void wire_send(enum kind kind, uint32_t id, const void *payload, size_t size) {
    if (wire_room() < size)
        return;
    unsigned char *at = wire_begin(size);
    if (size)
        memcpy(at, payload, size);
    wire_commit(kind, id, size);
}

void wire_fail(uint32_t id, int error, const char *what) {
    unsigned char payload[256];
    size_t size = strlen(what);
    size = size < sizeof payload - 4 ? size : sizeof payload - 4;
    memcpy(put32(payload, (uint32_t)error), what, size);
    wire_send(F_FAILED, id, payload, size + 4);
}

static void hang_up(void) {
    forget(sock);
    sock = -1;
    free(in);
    in = NULL;
    in_size = in_to = out_from = out_to = 0;
    int64_t now = now_us();
    if (welcomed)
        orphan_at = now + orphan_us;
    welcomed = false;
    retry_at = now + backoff;
    command_detach_all();
}

/* Who we are, and what of an earlier connection is still there. */
static void say_hello(void) {
    unsigned char *start = wire_begin(8 + LISTED_MOST * SLOTS), *at = start;
    at = put32(at, PROTOCOL);
    at = put32(at, (uint32_t)self.max_commands);
    at = command_list(at);
    wire_commit(F_HELLO, 0, (size_t)(at - start));
}

/* In the directory that was there before any code of the sandbox ran: the path to it can be renamed later,
 * and then somebody else might answer there. */
static int connect_there(void) {
    int here = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int failed = here < 0 || fchdir(folder) != 0 || connect(sock, (struct sockaddr *)&address, sizeof address) != 0;
    if (here >= 0 && (fchdir(here) != 0 || close(here) != 0))
        return -1;
    return failed ? -1 : 0;
}

static void dial(int64_t now) {
    retry_at = now + backoff;
    backoff = backoff * 3 / 2 < BACKOFF_LAST_US ? backoff * 3 / 2 : BACKOFF_LAST_US;
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (sock < 0)
        return;
    in = malloc(IN_SIZE);
    if (!in || connect_there() != 0) {
        hang_up();
        return;
    }
    in_size = IN_SIZE;
    interest = EPOLLIN;
    watch(sock, interest, TAG_SOCKET, true);
    say_hello();
    wire_flush();
}

void wire_open(const char *path, int64_t orphan) {
    const char *name = strrchr(path, '/');
    char above[sizeof address.sun_path + 1] = ".";
    if (name)
        memcpy(above, path, (size_t)(name - path + 1));
    folder = open(above, O_PATH | O_DIRECTORY | O_CLOEXEC);
    strncpy(address.sun_path, name ? name + 1 : path, sizeof address.sun_path - 1);
    orphan_us = orphan;
    orphan_at = now_us() + orphan;
}

static bool welcome(const unsigned char *payload, size_t size) {
    if (welcomed || size < 4 || get32(payload) != PROTOCOL)
        return false;
    welcomed = true;
    push_left = PUSH_WINDOW;
    backoff = BACKOFF_FIRST_US;
    return true;
}

static bool handle(const unsigned char *frame, size_t size) {
    enum kind kind = frame[0];
    uint32_t id = get32(frame + 1);
    const unsigned char *payload = frame + 5;
    size -= 5;
    if (kind == F_WELCOME)
        return welcome(payload, size);
    if (!welcomed)
        return false;
    if (kind == F_PING) {
        wire_send(F_PONG, id, payload, size < 64 ? size : 64);
        return true;
    }
    if (kind == F_ACK && id == 0) {
        uint32_t count = size == 4 ? get32(payload) : 0;
        bool fits = size == 4 && count <= PUSH_WINDOW - push_left;
        push_left += fits ? count : 0;
        return fits;
    }
    return command_frame(kind, id, payload, size);
}

/* Handles what is complete; false when the server broke the protocol. */
static bool parse(void) {
    size_t from = 0;
    while (in_to - from >= 4 && wire_room() >= REPLY_ROOM) {
        size_t size = get32(in + from);
        if (size < 5 || size > FRAME_MAX)
            return false;
        if (in_to - from - 4 < size) {
            if (size + 4 > in_size) {
                unsigned char *larger = realloc(in, size + 4);
                if (!larger)
                    return false;
                in = larger;
                in_size = size + 4;
            }
            break;
        }
        if (!handle(in + from + 4, size))
            return false;
        from += 4 + size;
    }
    memmove(in, in + from, in_to - from);
    in_to -= from;
    if (in_size > IN_SIZE && in_to < IN_SIZE && (in_to < 4 || get32(in) + 4 <= IN_SIZE)) {
        unsigned char *smaller = realloc(in, IN_SIZE);
        in = smaller ? smaller : in;
        in_size = smaller ? IN_SIZE : in_size;
    }
    return true;
}

static bool receive(void) {
    while (in_to < in_size && wire_room() >= REPLY_ROOM) {
        ssize_t got = read(sock, in + in_to, in_size - in_to);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno == EAGAIN;
        if (got == 0)
            return false;
        in_to += (size_t)got;
        if (!parse())
            return false;
        if ((size_t)got < IN_SIZE / 2) /* most likely all there is: let the others have their turn */
            return true;
    }
    return true;
}

void wire_event(uint32_t events) {
    if (sock < 0)
        return;
    if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && !receive())
        hang_up();
}

static void choose_interest(void) {
    uint32_t wanted = (wire_room() >= REPLY_ROOM ? EPOLLIN : 0) | (out_to > out_from ? EPOLLOUT : 0);
    if (wanted != interest)
        watch(sock, interest = wanted, TAG_SOCKET, false);
}

void wire_flush(void) {
    while (sock >= 0 && out_to > out_from) {
        ssize_t put = write(sock, out + out_from, out_to - out_from);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && errno != EAGAIN) {
            hang_up();
            return;
        }
        if (put < 0)
            break;
        out_from += (size_t)put;
    }
    if (out_from == out_to)
        out_from = out_to = 0;
    if (sock < 0)
        return;
    /* Frames that waited in the in buffer for room in the out buffer. */
    if (in_to >= 4 && wire_room() >= REPLY_ROOM && !parse()) {
        hang_up();
        return;
    }
    choose_interest();
}

/* Reconnects; ends everything when nobody has welcomed us for too long. When to call again, or 0. */
int64_t wire_tick(int64_t now) {
    if (welcomed)
        return 0;
    if (now >= orphan_at)
        end_everything();
    if (sock < 0 && now >= retry_at)
        dial(now);
    return sock < 0 && retry_at < orphan_at ? retry_at : orphan_at;
}
