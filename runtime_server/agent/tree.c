/* Killing everything that descends from a command, while it forks as fast as it can.
 *
 * Descendants are found by parent: the supervisor is a subreaper, so none can leave its subtree. A round
 * looks at /proc once for all commands that are being killed. First every member is stopped: a stopped
 * process cannot fork and keeps its pid, so a fork bomb runs out of pids and stands still. When a round
 * finds nothing that moves (or after FREEZE_US) everything is killed, and the next round looks again.
 * It is over when the supervisor exits (it does only when it has no children left) or CLEAN rounds in a
 * row found nobody.
 *
 * A bomb of hundreds of processes leaves us so little of the processor that looking alone takes seconds.
 * When that shows (SLOW_US), or something still moves after ESCALATE_US, the whole sandbox is stopped by
 * one system call, kill(-1), which nothing can fork past; the command dies, the others go on. What outlives
 * LAST_US takes every command of the sandbox with it.
 *
 * If code in the sandbox kills a supervisor, its orphans become our own children. Nothing else can be our
 * child and no supervisor, so all of these belong to the command whose supervisor is gone. A supervisor that
 * waits for its next command belongs to none.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FREEZE_US 100000
#define SLOW_US 20000
#define ESCALATE_US 500000
#define HOLD_US 500000 /* no longer than this in one go */
#define LAST_US 2000000
#define CLEAN 8 /* what hops from pid to pid may be missed by a round or two */
/* A supervisor exits by itself when nobody is left: it is waited for, unless it is stopped. */
#define CLEAN_WATCHED 40

enum { UNKNOWN = -1, OUTSIDE = -2, ORPHAN = -3, UNSEEN = -4 };

struct process {
    pid_t pid, parent;
    int owner;      /* index of a command, or one of the above */
    int supervises; /* index of a command, or -1 */
    char state;
    bool dead;
    uint64_t start; /* clock ticks since the machine's start */
};

static DIR *proc;
static int load = -1; /* /proc/loadavg ends with the pid that was given last */
static struct process *list;
static size_t count, capacity;
static bool unsettled; /* a process whose parent vanished while we looked: look again */
static bool held;      /* every process of the sandbox is stopped */
static int64_t held_us;

void tree_open(void) {
    proc = opendir("/proc"); /* held, so that nothing mounted over it later can lie to us */
    load = proc ? openat(dirfd(proc), "loadavg", O_RDONLY | O_CLOEXEC) : -1;
}

uint64_t tree_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (uint64_t)t.tv_sec * 100 + (uint64_t)t.tv_nsec / 10000000;
}

pid_t tree_last_pid(void) {
    char text[128];
    ssize_t size = load < 0 ? 0 : pread(load, text, sizeof text - 1, 0);
    text[size > 0 ? size : 0] = 0;
    const char *last = strrchr(text, ' ');
    return last ? atoi(last) : 0;
}

/* What one of our descriptors refers to, opened again: a pipe's other end, for one. */
int tree_reopen(int fd, int flags) {
    char path[32];
    snprintf(path, sizeof path, "self/fd/%d", fd);
    return proc ? openat(dirfd(proc), path, flags | O_CLOEXEC) : -1;
}

static const char *after(const char *text, unsigned fields) {
    while (fields-- && text) {
        text = strchr(text, ' ');
        text = text ? text + 1 : NULL;
    }
    return text;
}

/* /proc/PID/stat; the name in it is the process's own choice, so we start behind its last parenthesis. */
static bool look(const char *pid, struct process *p) {
    char path[32], text[1024];
    strcpy(path, pid);
    strcat(path, "/stat");
    int fd = openat(dirfd(proc), path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (size <= 0)
        return false;
    text[size] = 0;
    const char *fields = strrchr(text, ')');
    const char *parent = fields ? after(fields, 2) : NULL, *threads = parent ? after(parent, 16) : NULL;
    const char *start = threads ? after(threads, 2) : NULL;
    if (!start)
        return false;
    *p = (struct process){atoi(pid), atoi(parent), UNKNOWN, -1, fields[2], false, strtoull(start, NULL, 10)};
    /* A process whose first thread has ended looks like a zombie while its other threads run on. */
    p->dead = (p->state == 'Z' || p->state == 'X') && atoi(threads) <= 1;
    return true;
}

static int by_pid(const void *a, const void *b) {
    return ((const struct process *)a)->pid - ((const struct process *)b)->pid;
}

static struct process *find(pid_t pid) {
    struct process key = {.pid = pid};
    return bsearch(&key, list, count, sizeof *list, by_pid);
}

static bool enlarge(void) {
    size_t larger = capacity ? capacity * 2 : 256;
    struct process *moved = realloc(list, larger * sizeof *list);
    if (moved) {
        list = moved;
        capacity = larger;
    }
    return moved;
}

static void hold(int64_t now) {
    kill(-1, SIGSTOP);
    held_us = held ? held_us : now;
    held = true;
    for (unsigned i = 0; i < used; i++)
        commands[i].phase = P_KILL;
}

/* Also when the last of the dying has ended between two rounds, with nobody left to hold the others for. */
void tree_release(void) {
    if (held)
        kill(-1, SIGCONT);
    held = false;
}

static bool scan(void) {
    if (!proc)
        return false;
    int64_t began = now_us();
    count = 0;
    rewinddir(proc);
    for (struct dirent *entry; (entry = readdir(proc));) {
        if (entry->d_name[0] < '1' || entry->d_name[0] > '9' || strlen(entry->d_name) > 10)
            continue;
        if (count == capacity && !enlarge())
            return false;
        if (look(entry->d_name, &list[count]))
            count++;
        if (!held && count % 32 == 0 && now_us() - began > SLOW_US) {
            hold(began);
            return scan();
        }
    }
    qsort(list, count, sizeof *list, by_pid);
    for (unsigned i = 0; i < used; i++) {
        struct process *p = commands[i].job && commands[i].pid > 0 ? find(commands[i].pid) : NULL;
        if (p) {
            p->supervises = (int)i;
            p->owner = OUTSIDE;
        }
    }
    for (size_t i = 0; i < count; i++)
        if (resident_idle(list[i].pid))
            list[i].owner = OUTSIDE;
    return true;
}

/* What the parent of `p` says about its owner; UNKNOWN and `*next` when the parent must be asked. */
static int ask(const struct process *p, struct process **next) {
    *next = NULL;
    if (p->owner != UNKNOWN)
        return p->owner;
    if (p->parent == 0)
        return OUTSIDE; /* ourselves, or somebody who entered from outside */
    if (p->parent == 1)
        return ORPHAN;
    struct process *parent = find(p->parent);
    if (!parent)
        return UNSEEN;
    if (parent->supervises >= 0)
        return parent->supervises;
    *next = parent;
    return UNKNOWN;
}

static void resolve(struct process *p) {
    struct process *at = p, *next;
    int owner = UNKNOWN;
    for (size_t steps = 0; steps <= count && (owner = ask(at, &next)) == UNKNOWN; steps++)
        at = next;
    owner = owner == UNKNOWN ? UNSEEN : owner; /* a circle: pids were reused while we looked */
    for (at = p; at && at->owner == UNKNOWN; at = next) {
        ask(at, &next);
        at->owner = owner;
    }
}

/* Whether `p` came with what its session runs now: not the shell, nothing that was there before. */
static bool is_of_run(const struct process *p, const struct command *run) {
    bool later = p->start > run->born_tick || (p->start == run->born_tick && p->pid > run->born_pid);
    return later && p->pid != atomic_load(&command_slot(run->peer)->root);
}

/* The command that `p` is to die with, or NULL. */
static struct command *doomed_with(const struct process *p) {
    if (p->owner >= 0) {
        struct command *c = &commands[p->owner], *run = c->job == J_SHELL ? c->peer : NULL;
        if (c->state == S_KILLING)
            return c;
        return run && run->state == S_KILLING && is_of_run(p, run) ? run : NULL;
    }
    for (unsigned i = 0; p->owner == ORPHAN && i < used; i++)
        if (command_has_tree(&commands[i]) && commands[i].state == S_KILLING && commands[i].pid == 0)
            return &commands[i];
    return NULL;
}

static void strike(const struct process *p) {
    struct command *c = p->dead ? NULL : doomed_with(p);
    if (!c)
        return;
    c->live++;
    if (c->phase == P_KILL) {
        kill(p->pid, SIGKILL);
    } else if (!strchr("TtD", p->state)) {
        c->moving++;
        kill(p->pid, SIGSTOP);
    }
}

static bool survey(void) {
    if (!scan())
        return false;
    unsettled = false;
    for (unsigned i = 0; i < used; i++)
        commands[i].live = commands[i].moving = 0;
    for (size_t i = 0; i < count; i++) {
        resolve(&list[i]);
        unsettled |= list[i].owner == UNSEEN && !list[i].dead;
    }
    return true;
}

static void strike_all(void) {
    for (size_t i = 0; i < count; i++)
        strike(&list[i]);
}

static void kill_members(const struct command *c) {
    for (size_t i = 0; i < count; i++)
        if (!list[i].dead && doomed_with(&list[i]) == c)
            kill(list[i].pid, SIGKILL);
}

static void everybody_dies(void) {
    resident_end_all();
    held = false;
    for (unsigned i = 0; i < used; i++)
        if (command_has_tree(&commands[i]) && commands[i].state != S_KILLING)
            command_doom(&commands[i], KILLED);
}

/* A session's command is gone, and its shell has yet to say that it left it; session.c sees to that. */
static bool waits_for_shell(const struct command *c) {
    return c->job == J_RUN && c->clean >= CLEAN && !atomic_load(&command_slot(c)->done);
}

static void advance(struct command *c, int64_t now) {
    c->clean = c->live || unsettled ? 0 : c->clean + 1;
    if (c->clean == CLEAN && c->pid > 0)
        kill(c->pid, SIGCONT);
    if (waits_for_shell(c))
        return;
    if (c->clean >= (c->pid > 0 ? CLEAN_WATCHED : CLEAN)) {
        if (c->pid > 0)
            resident_end(c->pid); /* stopped, or waiting for a zombie that somebody traces */
        command_settle(c);
        return;
    }
    if (held)
        return;
    bool still = !c->moving && !unsettled;
    if (c->phase == P_FREEZE && (still || now - c->phase_us > FREEZE_US)) {
        kill_members(c);
        c->phase = P_KILL;
        c->phase_us = now;
    } else if (c->phase == P_KILL && now - c->phase_us > FREEZE_US) {
        c->phase = P_FREEZE;
        c->phase_us = now;
    }
}

static void forget_storm(void) {
    if (count <= 4096)
        return;
    free(list);
    list = NULL;
    count = capacity = 0;
}

/* Whether to stop the whole sandbox: we were woken far too late, or it has taken too long already. */
static bool hard_to_kill(const struct command *c, int64_t now) {
    bool late = (c->flags & TIMED_OUT) && c->kill_us - c->deadline_us > SLOW_US;
    return late || now - c->kill_us > ESCALATE_US;
}

/* One round for all commands in S_KILLING. */
void tree_tick(int64_t now) {
    bool hard = held, last = false;
    for (unsigned i = 0; i < used; i++)
        if (command_is_dying(&commands[i]) && !waits_for_shell(&commands[i])) {
            hard |= hard_to_kill(&commands[i], now);
            last |= now - commands[i].kill_us > LAST_US;
        }
    if (hard)
        hold(now);
    if (!survey() || last)
        everybody_dies();
    strike_all();
    bool left = false;
    for (unsigned i = 0; i < used; i++) {
        struct command *c = &commands[i];
        if (!command_is_dying(c))
            continue;
        advance(c, now);
        left |= c->state == S_KILLING;
    }
    if (!left || now - held_us > HOLD_US)
        tree_release();
    forget_storm();
}

/* To everything that descends from a command, whatever session or group it made itself, and that was not
 * there before `since`. */
void tree_signal(struct command *c, int signal, uint64_t since) {
    if (!survey())
        return;
    for (size_t i = 0; i < count; i++) {
        const struct process *p = &list[i];
        const struct command *owner = p->owner >= 0 ? &commands[p->owner] : NULL;
        if (!p->dead && p->start >= since && owner && (owner == c || (c->job == J_RUN && owner == c->peer && is_of_run(p, c))))
            kill(p->pid, signal);
    }
    tree_release();
    forget_storm();
}
