/* What the agent tells the server about its commands, as far as the out buffer has room, and the clock. */
#include "agent.h"

#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/wait.h>

static unsigned next_turn;

static void tell_credit(struct command *c) {
    bool closed = c->in < 0 && !c->stdin_eof && !c->stdin_told && c->state < S_SENDING;
    if ((!closed && c->credit < WINDOW / 4) || c->detached || wire_room() < 4)
        return;
    unsigned char payload[4];
    put32(payload, closed ? STDIN_CLOSED : c->credit);
    wire_send(F_CREDIT, c->id, payload, sizeof payload);
    c->credit = 0;
    c->stdin_told = closed;
}

/* The program runs; for a server that waits to hear it, or that picks the command up again. */
static void tell_started(struct command *c) {
    unsigned char payload[5];
    int root = c->job == J_RUN ? 1 : atomic_load(&command_slot(c)->root);
    bool ready = c->job == J_SHELL ? c->sequence > 0 : root != 0;
    if (!ready || c->detached || wire_room() < REPLY_ROOM)
        return;
    put32(payload, (uint32_t)root);
    payload[4] = c->in >= 0 || (c->job == J_SHELL && c->master >= 0); /* of a session: whether it is a terminal */
    wire_send(F_STARTED, c->id, payload, sizeof payload);
    c->announce = false;
}

/* What is new of a stream, as far as the server's window and the out buffer go. True when all of it went. */
static bool push_output(struct command *c) {
    for (unsigned which = 0; which < 2; which++) {
        const struct keep *k = &c->kept[which];
        while ((c->sent[which] = keep_next(k, c->sent[which])) < k->total) {
            if (!push_left || wire_room() < CHUNK + REPLY_ROOM)
                return false;
            unsigned char *at = wire_begin(CHUNK + 9);
            *at = (unsigned char)(which + 1);
            put64(at + 1, c->sent[which]);
            size_t count = keep_copy_at(k, c->sent[which], at + 9, push_left < CHUNK ? push_left : CHUNK);
            wire_commit(F_CHUNK, c->id, count + 9);
            c->sent[which] += count;
            push_left -= (uint32_t)count;
        }
    }
    return true;
}

/* True when every kept byte is in the out buffer. */
static bool send_output(struct command *c) {
    if (c->push)
        return push_output(c);
    for (unsigned which = 0; which < 2; which++) {
        while (c->sent[which] < keep_count(&c->kept[which])) {
            if (wire_room() < CHUNK + REPLY_ROOM)
                return false;
            unsigned char *at = wire_begin(CHUNK + 1);
            *at = (unsigned char)(which + 1);
            size_t count = keep_copy(&c->kept[which], c->sent[which], at + 1, CHUNK);
            wire_commit(F_OUTPUT, c->id, count + 1);
            c->sent[which] += count;
        }
    }
    return true;
}

static uint32_t exit_code(const struct command *c) {
    if (c->flags & TIMED_OUT)
        return 124;
    return WIFSIGNALED(c->status) ? 128u + (uint32_t)WTERMSIG(c->status) : (uint32_t)WEXITSTATUS(c->status);
}

static void send_finished(const struct command *c) {
    unsigned char payload[42], *at = payload;
    at = put32(at, exit_code(c));
    *at++ = WIFSIGNALED(c->status) ? (unsigned char)WTERMSIG(c->status) : 0;
    *at++ = c->flags;
    at = put64(at, (uint64_t)c->took_us);
    for (unsigned which = 0; which < 2; which++) {
        const struct keep *k = &c->kept[which];
        at = put64(at, k->total);
        at = put32(at, (uint32_t)(k->total > k->cap ? k->head : keep_count(k)));
    }
    wire_send(F_FINISHED, c->id, payload, (size_t)(at - payload));
}

static void send_file_result(const struct command *c, const struct slot *slot) {
    unsigned char payload[8];
    put64(payload, slot->value);
    if (!atomic_load(&slot->done))
        wire_fail(c->id, 4 /* EINTR */, "the file helper was killed");
    else if (slot->error)
        wire_fail(c->id, slot->error, slot->what);
    else
        wire_send(F_DONE, c->id, payload, sizeof payload);
}

/* False when there is no room for it yet. */
static bool send_result(struct command *c) {
    const struct slot *slot = command_slot(c);
    if (wire_room() < REPLY_ROOM)
        return false;
    if (c->job == J_READ || c->job == J_WRITE)
        send_file_result(c, slot);
    else if (slot->what)
        wire_fail(c->id, slot->error, slot->what);
    else if (!send_output(c))
        return false;
    else
        send_finished(c);
    return true;
}

/* Background processes keep their supervisor, and the pipes they may write to are still emptied. */
static bool retire(struct command *c) {
    bool keeps = command_has_tree(c) || c->job == J_RUN;
    if (!c->detached && !send_result(c))
        return false;
    if (keeps && (c->detached || c->tag[0]))
        command_hold(c);
    else
        command_release(c);
    return true;
}

/* True when somebody waits for room in the out buffer. */
bool command_pump(void) {
    unsigned count = used;
    bool waiting = false;
    for (unsigned n = 0; n < count; n++) {
        struct command *c = &commands[(next_turn + n) % count];
        if (!c->job || c->state >= S_HELD)
            continue;
        if (c->announce)
            tell_started(c);
        tell_credit(c);
        if (c->push && !c->announce && !c->detached && c->state < S_SENDING)
            waiting |= !push_output(c) && push_left;
        if (c->paused && c->out[0] >= 0 && wire_room() >= CHUNK + REPLY_ROOM && (!c->windowed || c->window)) {
            c->paused = false;
            command_watch(c, 1, EPOLLIN, false);
        }
        if (c->job == J_READ && c->state == S_RUNNING && !c->pid && c->out[0] < 0)
            c->state = S_SENDING;
        waiting |= c->paused && (!c->windowed || c->window);
        if (c->state == S_SENDING && !retire(c))
            waiting |= !c->push || push_left;
    }
    next_turn++;
    return waiting;
}

static int64_t sooner(int64_t a, int64_t b) {
    return a && (!b || a < b) ? a : b;
}

/* Deadlines and graces. When to call again, or 0. */
int64_t command_tick(int64_t now) {
    int64_t next = 0;
    bool killing = false;
    for (unsigned i = 0; i < used; i++) {
        struct command *c = &commands[i];
        if (!command_has_tree(c) && c->job != J_RUN)
            continue;
        if (c->state == S_RUNNING && c->deadline_us && now >= c->deadline_us)
            command_doom(c, TIMED_OUT);
        if (c->state == S_GRACE && (now >= c->grace_us || (c->out[0] < 0 && c->out[1] < 0)))
            command_settle(c);
        if (c->watch_us && now >= c->watch_us)
            output_watch(c);
        if (c->job == J_RUN)
            next = sooner(session_tick(c, now), next);
        if (c->state == S_RUNNING)
            next = sooner(sooner(c->watch_us, c->deadline_us), next);
        if (c->state == S_GRACE)
            next = sooner(c->grace_us, next);
        killing |= command_is_dying(c);
    }
    if (killing) {
        tree_tick(now);
        next = sooner(now_us() + 2000, next);
    } else {
        tree_release();
    }
    return next;
}
