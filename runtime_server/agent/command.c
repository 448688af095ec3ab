/* One command: its pipes, what it may still read, what is kept of its output, its life.
 *
 *   running → (program ended) → grace → sending → lingering (background processes are left) → free
 *           ↘ (timeout, cancel) killing ↗
 *
 * Every pipe is non-blocking on our side. A program that does not read its stdin holds up only itself: the
 * server may send WINDOW bytes, and more only after we said they were taken. Output pipes are always read,
 * also those that background processes of a finished command hold, so that none of them ever blocks.
 */
#include "agent.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/wait.h>
#include <unistd.h>

struct command commands[SLOTS];
struct slot *slots;
unsigned used;
static uint32_t kill_all_id;
static bool killing_all;

struct slot *command_slot(const struct command *c) {
    return &slots[c - commands];
}

struct command *command_find(uint32_t id) {
    for (unsigned i = 0; i < used; i++)
        if (commands[i].job && commands[i].state != S_LINGER && commands[i].id == id)
            return &commands[i];
    return NULL;
}

struct command *command_new(enum job job, uint32_t id) {
    unsigned i = 0;
    while (i < SLOTS && commands[i].job)
        i++;
    if (i == SLOTS)
        return NULL;
    used = i < used ? used : i + 1;
    commands[i] = (struct command){
        .job = job, .id = id, .in = -1, .out = {-1, -1}, .master = -1, .started_us = now_us()};
    slots[i] = (struct slot){0};
    return &commands[i];
}

void command_close(int *fd) {
    if (*fd >= 0)
        forget(*fd);
    *fd = -1;
}

void command_close_stdin(struct command *c) {
    command_close(&c->in);
    free(c->pending);
    c->pending = NULL;
    c->pending_from = c->pending_to = 0;
}

void command_free(struct command *c) {
    if (c->job == J_SHELL)
        session_free(c);
    command_close_stdin(c);
    output_close(c, 0);
    output_close(c, 1);
    command_close(&c->master);
    keep_free(&c->kept[0]);
    keep_free(&c->kept[1]);
    c->job = J_NONE;
    while (used && !commands[used - 1].job)
        used--;
}

bool command_alone(const struct command *c) {
    return command_has_tree(c) && atomic_load(&command_slot(c)->alone);
}

void command_watch(struct command *c, unsigned stream, uint32_t events, bool add) {
    int fd = stream ? c->out[stream - 1] : c->in;
    watch(fd, events, (uint64_t)(c - commands) * 4 + stream, add);
}

/* ---- stdin ------------------------------------------------------------------------------------------ */

static void arm_stdin(struct command *c, bool arm) {
    if (c->in >= 0 && c->stdin_armed != arm)
        command_watch(c, 0, (c->stdin_armed = arm) ? EPOLLOUT : 0, false);
}

/* Writes what is pending; at the end of it closes the pipe, so that the program sees the end. */
static void feed(struct command *c) {
    while (c->in >= 0 && c->pending_to > c->pending_from) {
        ssize_t put = write(c->in, c->pending + c->pending_from, c->pending_to - c->pending_from);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && errno != EAGAIN) {
            command_close_stdin(c); /* the program closed its end: it wants no more */
            return;
        }
        if (put < 0)
            break;
        c->pending_from += (size_t)put;
        c->credit += (uint32_t)put;
    }
    if (c->pending_from == c->pending_to && c->stdin_eof) {
        if (c->master >= 0 && c->in >= 0 && write(c->in, "\4", 1) < 0 && errno == EAGAIN)
            return; /* a terminal says the end with a character; it is full, and stays armed */
        command_close_stdin(c);
    }
    arm_stdin(c, c->pending_to > c->pending_from);
}

/* False when the server sent more than it was allowed. */
static bool take_stdin(struct command *c, const unsigned char *bytes, size_t count) {
    if (c->in < 0)
        return true; /* closed meanwhile; the server will learn it, or has finished */
    if (count == 0)
        c->stdin_eof = true;
    if (c->pending_to - c->pending_from + count > WINDOW)
        return false;
    if (!c->pending && count && !(c->pending = malloc(WINDOW))) {
        command_close_stdin(c);
        return true;
    }
    if (c->pending_to + count > WINDOW) {
        memmove(c->pending, c->pending + c->pending_from, c->pending_to - c->pending_from);
        c->pending_to -= c->pending_from;
        c->pending_from = 0;
    }
    if (count)
        memcpy(c->pending + c->pending_to, bytes, count);
    c->pending_to += count;
    feed(c);
    return true;
}

void command_event(unsigned index, unsigned which, uint32_t events) {
    struct command *c = &commands[index];
    if (!c->job)
        return;
    if (which == 0 && c->in >= 0) {
        if (events & EPOLLERR)
            command_close_stdin(c); /* the reader has gone */
        else
            feed(c);
    } else if (which == 3) {
        session_status(c);
    } else if (which && c->out[which - 1] >= 0) {
        if (c->job == J_READ)
            output_stream(c);
        else
            output_collect(c, which - 1);
    }
}

/* ---- the end of a command --------------------------------------------------------------------------- */

/* The result is final. Nobody to tell it to: straight to what remains. */
void command_settle(struct command *c) {
    if (c->job == J_RUN)
        session_leave(c);
    output_drain(c);
    command_close_stdin(c);
    c->state = S_SENDING;
    if (!c->took_us)
        c->took_us = now_us() - c->started_us;
    if (c->job == J_SHELL)
        session_ended(c);
}

/* Nothing of it may live on: a timeout, or nobody wants the result. */
void command_doom(struct command *c, uint8_t flags) {
    c->flags |= flags;
    if (c->job == J_READ || c->job == J_WRITE) {
        command_close_stdin(c); /* cut off, the helper removes its temporary file and ends; killed, it could not */
        command_close(&c->out[0]);
        return;
    }
    if (c->state > S_GRACE)
        return;
    c->state = S_KILLING;
    c->phase = P_FREEZE;
    c->status = SIGKILL;
    c->kill_us = c->phase_us = now_us();
    c->clean = 0;
    if (c->job == J_RUN)
        session_abort(c);
}

static void program_ended(struct command *c, int status) {
    c->status = status;
    c->took_us = now_us() - c->started_us;
    if (command_alone(c))
        return; /* settled at once */
    if (c->watch_us)
        output_watch(c);
    output_drain(c);
    command_close_stdin(c);
    c->state = S_GRACE;
    c->grace_us = c->started_us + c->took_us + GRACE_MS * 1000;
}

/* Its supervisor has nobody left to look after, and goes on to another command. Not after a killing: that may
 * have hit it too. */
static void part(struct command *c) {
    if (c->state == S_KILLING) {
        resident_end(c->pid);
        return; /* and its end settles the command */
    }
    resident_free(c->pid);
    c->pid = 0;
    if (c->state < S_SENDING)
        command_settle(c);
    else if (c->state == S_LINGER)
        command_free(c);
}

/* Supervisors report through their slot and ring; this finds out who did. */
void command_bell(void) {
    for (unsigned i = 0; i < used; i++) {
        struct command *c = &commands[i];
        if (command_has_tree(c) && c->state == S_RUNNING && atomic_load(&slots[i].done)) {
            if (slots[i].what)
                command_settle(c); /* it never started */
            else
                program_ended(c, slots[i].status);
        }
        if (command_has_tree(c) && c->pid > 0 && command_alone(c))
            part(c);
    }
}

static void supervisor_gone(struct command *c, int status) {
    command_bell(); /* it may have reported just before */
    if (c->state == S_RUNNING)
        command_doom(c, KILLED); /* killed by code of the sandbox; tree.c finds its orphans */
    else if (c->state == S_GRACE || (c->state == S_KILLING && (WIFEXITED(status) || command_alone(c))))
        command_settle(c); /* it exits only when no descendant is left */
    else if (c->state == S_LINGER)
        command_free(c);
}

void command_reaped(pid_t pid, int status) {
    resident_gone(pid);
    for (unsigned i = 0; i < used; i++) {
        struct command *c = &commands[i];
        if (!c->job || c->pid != pid)
            continue;
        c->pid = 0;
        if (command_has_tree(c))
            supervisor_gone(c, status);
        else if (c->job == J_WRITE || c->out[0] < 0)
            command_settle(c);
        return;
    }
}

/* ---- what the server says --------------------------------------------------------------------------- */

void command_kill_all(uint32_t id) {
    killing_all = true;
    kill_all_id = id;
    resident_end_all();
    for (unsigned i = 0; i < used; i++)
        if (command_has_tree(&commands[i]))
            command_doom(&commands[i], KILLED);
}

bool command_killing_all(void) {
    return killing_all;
}

void command_no_children(void) {
    if (killing_all)
        wire_send(F_DONE, kill_all_id, (unsigned char[8]){0}, 8);
    killing_all = false;
}

static void signal_frame(struct command *c, int number, uint32_t grace_ms) {
    if (c->state > S_GRACE)
        return;
    if (c->job == J_RUN && number == SIGINT)
        session_interrupt(c, grace_ms);
    else if (number >= 1 && number <= 64)
        tree_signal(c, number, 0);
}

static bool acknowledge(struct command *c, uint32_t count) {
    if (!c->windowed || count > PUSH_WINDOW - c->window)
        return false;
    c->window += count;
    return true;
}

/* About a call that is there, or is not any more; false when the server broke the protocol. */
static bool about(struct command *c, enum kind kind, uint32_t id, const unsigned char *payload, size_t size) {
    if (kind == F_ATTACH && (!c || !command_attach(c)))
        wire_fail(id, ESRCH, "no such command: its result was released, or gave way to newer ones");
    if (!c)
        return true;
    if (kind == F_DATA)
        return take_stdin(c, payload, size);
    if (kind == F_CANCEL)
        command_doom(c, KILLED);
    else if (kind == F_RELEASE && c->state == S_HELD)
        command_release(c);
    else if (kind == F_SIGNAL && size == 8)
        signal_frame(c, (int)get32(payload), get32(payload + 4));
    else if (kind == F_RESIZE && size == 8 && c->master >= 0)
        pty_resize(c->master, get32(payload), get32(payload + 4));
    else if (kind == F_ACK)
        return size == 4 && acknowledge(c, get32(payload));
    return true;
}

/* False when the server broke the protocol. */
bool command_frame(enum kind kind, uint32_t id, const unsigned char *payload, size_t size) {
    static void (*const starts[])(uint32_t, const unsigned char *, size_t) = {
        [F_EXEC] = exec_frame, [F_WRITE] = write_frame, [F_READ] = read_frame,    [F_OPEN] = open_frame,
        [F_RUN] = run_frame,   [F_PACK] = pack_frame,   [F_UNPACK] = unpack_frame};
    struct command *c = command_find(id);
    if (kind == F_DATA || kind == F_CANCEL || (kind >= F_SIGNAL && kind <= F_RELEASE) || kind == F_ACK)
        return about(c, kind, id, payload, size);
    if (c && c->state == S_HELD) {
        command_release(c); /* ids may come round again */
        c = NULL;
    }
    if (c)
        return false; /* the id is taken */
    if (kind == F_KILL_ALL)
        command_kill_all(id);
    else if (kind < sizeof starts / sizeof *starts && starts[kind])
        starts[kind](id, payload, size);
    else
        return false;
    return true;
}

/* The connection is gone. Commands run on, within their timeouts; half-done file jobs are given up. */
void command_detach_all(void) {
    killing_all = false;
    for (unsigned i = 0; i < used; i++) {
        struct command *c = &commands[i];
        if (!c->job || c->state == S_LINGER)
            continue;
        c->detached = true;
        if (command_has_tree(c) || c->job == J_RUN) {
            if (!c->push && !c->stdin_eof) {
                c->stdin_eof = true; /* half of it: nobody will send the rest */
                feed(c);
            }
            continue;
        }
        command_close_stdin(c); /* too few bytes: the helper removes its temporary file */
        command_close(&c->out[0]);
        if (!c->pid)
            c->state = S_SENDING;
    }
}
