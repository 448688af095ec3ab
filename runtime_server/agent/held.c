/* Results that are kept, and commands that are picked up again by a server that has come back.
 *
 * Kept are those of commands with a tag, until the server releases them, and those of any command that
 * ended while nobody was connected. Never more than HELD_MOST of them, nor more than a quarter of what
 * kept output may take in all: the oldest go first.
 */
#include "agent.h"

#include <string.h>

static bool listed(const struct command *c) {
    return (command_has_tree(c) || c->job == J_RUN) && c->state != S_LINGER;
}

/* u32 count, then of each: u32 id, u32 id of its session, u8 what (1 command, 2 process, 3 session, 4 run),
 * u8 ended, tag, NUL. At most SLOTS * LISTED_MOST bytes. */
unsigned char *command_list(unsigned char *at) {
    unsigned char *counted = at;
    uint32_t count = 0;
    at += 4;
    for (unsigned i = 0; i < used; i++) {
        const struct command *c = &commands[i];
        if (!listed(c))
            continue;
        count++;
        at = put32(put32(at, c->id), c->parent);
        *at++ = c->job == J_SHELL ? 3 : c->job == J_RUN ? 4 : c->push ? 2 : 1;
        *at++ = c->state >= S_SENDING;
        size_t size = strlen(c->tag) + 1;
        memcpy(at, c->tag, size);
        at += size;
    }
    put32(counted, count);
    return at;
}

static size_t size_of(const struct command *c) {
    return c->kept[0].size + c->kept[1].size;
}

void command_release(struct command *c) {
    keep_free(&c->kept[0]);
    keep_free(&c->kept[1]);
    if (c->pid > 0)
        c->state = S_LINGER;
    else
        command_free(c);
}

static void trim(void) {
    for (;;) {
        struct command *oldest = NULL;
        unsigned count = 0;
        size_t bytes = 0;
        for (unsigned i = 0; i < used; i++) {
            struct command *c = &commands[i];
            if (!c->job || c->state != S_HELD)
                continue;
            count++;
            bytes += size_of(c);
            if (!oldest || c->started_us + c->took_us < oldest->started_us + oldest->took_us)
                oldest = c;
        }
        if (!oldest || (count <= HELD_MOST && (int64_t)bytes <= self.memory_most / 4))
            return;
        command_release(oldest);
    }
}

void command_hold(struct command *c) {
    c->state = S_HELD;
    command_close_stdin(c);
    trim();
}

/* Everything that is kept is sent (again), from the beginning; the server knows what it has. */
bool command_attach(struct command *c) {
    if (!listed(c))
        return false;
    c->detached = false;
    c->push = c->job != J_SHELL;
    c->announce = true;
    c->sent[0] = c->sent[1] = 0;
    c->stdin_told = false;
    c->credit = c->in >= 0 ? WINDOW - (uint32_t)(c->pending_to - c->pending_from) : 0;
    if (c->state == S_HELD)
        c->state = S_SENDING;
    return true;
}
