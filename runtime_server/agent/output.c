/* The output of a command: its pipes, or its terminal, and when they are read.
 *
 * A pipe of a command that has just begun is not watched: most are over before it is full, and then it is
 * read once, at the end.
 */
#include "agent.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PIPE_MOST (1 << 20) /* bytes that a pipe may be made to hold */
#define TERMINAL_READS 64 /* of 4 KiB; a terminal holds 68 */
static unsigned char scratch[64 * 1024];

void output_watch(struct command *c) {
    c->watch_us = 0;
    for (unsigned which = 0; which < 2; which++)
        if (c->out[which] >= 0)
            command_watch(c, which + 1, EPOLLIN, true);
}

/* One that was never watched needs not be forgotten. */
void output_close(struct command *c, unsigned which) {
    if (c->watch_us && c->out[which] >= 0) {
        close(c->out[which]);
        c->out[which] = -1;
    }
    command_close(&c->out[which]);
}

/* One read of at most `limit` bytes; false when there is nothing now or the pipe has ended. */
static bool collect(struct command *c, unsigned which, size_t limit) {
    ssize_t got = read(c->out[which], scratch, limit < sizeof scratch ? limit : sizeof scratch);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return errno == EINTR;
    if (got <= 0) {
        output_close(c, which);
        return false;
    }
    struct command *to = c->job == J_SHELL && c->peer ? c->peer : c;
    if (to->state < S_SENDING)
        keep_add(&to->kept[which], scratch, (size_t)got);
    return true;
}

/* A terminal hands on what was written to it a moment later, but a read that finds nothing makes the kernel
 * do that first: so reading until there is nothing misses nothing. No more than a terminal can hold. */
static void drain_terminal(struct command *c) {
    for (unsigned reads = 0; reads < TERMINAL_READS && c->out[0] >= 0 && collect(c, 0, sizeof scratch); reads++)
        continue;
}

/* What the program wrote before it ended is in the pipe now: exactly so much is read, however fast
 * background processes add to it. */
void output_drain(struct command *c) {
    if (c->master >= 0)
        drain_terminal(c);
    for (unsigned which = c->master >= 0 ? 2 : 0; which < 2; which++) {
        int waiting = PIPE_MOST; /* nobody is left who could add to it */
        if (c->out[which] < 0 || (!command_alone(c) && ioctl(c->out[which], FIONREAD, &waiting) != 0))
            continue;
        while (waiting > 0 && c->out[which] >= 0) {
            int part = waiting < (int)sizeof scratch ? waiting : (int)sizeof scratch;
            if (!collect(c, which, (size_t)part))
                break;
            waiting -= part;
        }
        if (waiting <= 0 && c->out[which] >= 0)
            collect(c, which, sizeof scratch); /* notices the end of the pipe */
    }
}

/* J_READ: straight from the pipe into the out buffer, while it has room. */
void output_stream(struct command *c) {
    if (wire_room() < CHUNK + REPLY_ROOM || (c->windowed && !c->window)) {
        c->paused = true;
        command_watch(c, 1, 0, false);
        return;
    }
    size_t most = c->windowed && c->window < CHUNK ? c->window : CHUNK;
    ssize_t got = read(c->out[0], wire_begin(CHUNK), most);
    if (got > 0) {
        wire_commit(F_CONTENT, c->id, (size_t)got);
        c->window -= c->windowed ? (uint32_t)got : 0;
    }
    else if (got == 0 || (errno != EAGAIN && errno != EINTR))
        command_close(&c->out[0]);
}

void output_collect(struct command *c, unsigned which) {
    collect(c, which, sizeof scratch);
}
