/* From a frame to a running job. The server is trusted no further than the frame's bounds. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

/* A command that is over by then is read once, at its end, and never watched. Its pipes hold 64 KiB: one that
 * writes more than that so soon waits for so long, once. */
#define WATCH_AFTER_US 2000

const unsigned char *take_bytes(struct reader *r, size_t count) {
    static const unsigned char zeros[8];
    if ((size_t)(r->end - r->at) < count) {
        r->good = false;
        return zeros;
    }
    r->at += count;
    return r->at - count;
}

char *take_string(struct reader *r) {
    const unsigned char *end = memchr(r->at, 0, (size_t)(r->end - r->at));
    if (!end) {
        r->good = false;
        return NULL;
    }
    char *string = (char *)(uintptr_t)r->at;
    r->at = end + 1;
    return string;
}

/* ---- pipes ------------------------------------------------------------------------------------------ */

/* Ours is non-blocking, theirs is an ordinary blocking end. */
bool open_pipe(int *ours, int *theirs, bool we_read) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        return false;
    *ours = we_read ? ends[0] : ends[1];
    *theirs = we_read ? ends[1] : ends[0];
    return fcntl(*ours, F_SETFL, O_NONBLOCK) == 0;
}

void close_theirs(const int *fds, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (fds[i] >= 0 && fds[i] != self.null)
            close(fds[i]);
}

/* Background processes of finished commands may hold many pipes; when there are no descriptors left, new
 * commands come first. */
static void close_lingering(void) {
    for (unsigned i = 0; i < used; i++)
        for (unsigned which = 0; commands[i].job && commands[i].state == S_LINGER && which < 2; which++)
            if (commands[i].out[which] >= 0) {
                forget(commands[i].out[which]);
                commands[i].out[which] = -1;
            }
}

static bool open_pipes(struct command *c, bool in, bool out, bool err, int theirs[3]) {
    theirs[0] = theirs[1] = theirs[2] = self.null;
    return (!in || open_pipe(&c->in, &theirs[0], false)) && (!out || open_pipe(&c->out[0], &theirs[1], true)) &&
           (!err || open_pipe(&c->out[1], &theirs[2], true));
}

struct command *prepare(enum job job, uint32_t id, bool in, bool out, bool err, int theirs[3]) {
    int running = 0;
    for (unsigned i = 0; i < used; i++)
        running += (commands[i].job && commands[i].state < S_HELD) + (commands[i].job == J_SHELL);
    struct command *c = running < self.max_commands ? command_new(job, id) : NULL;
    if (!c) {
        wire_fail(id, EAGAIN, "too many commands at once in this sandbox");
        return NULL;
    }
    bool opened = open_pipes(c, in, out, err, theirs);
    if (!opened && errno == EMFILE) {
        close_theirs(theirs, 3);
        command_free(c);
        close_lingering();
        c = command_new(job, id);
        opened = c && open_pipes(c, in, out, err, theirs);
    }
    if (opened)
        return c;
    wire_fail(id, errno, "cannot open a pipe");
    close_theirs(theirs, 3);
    command_free(c);
    return NULL;
}

/* No process to be had: the sandbox's own doing, and for a command a result, as a shell has it. */
static void not_started(struct command *c, int error) {
    static const char what[] = "cannot start a process (too many in this sandbox?)";
    struct slot *slot = command_slot(c);
    slot->error = error;
    slot->what = c->job == J_EXEC ? NULL : what;
    atomic_store(&slot->done, 1);
    command_settle(c);
    if (c->job != J_EXEC)
        return; /* a session that has no shell, a file that nobody writes: failures */
    c->status = 126 << 8;
    keep_add(&c->kept[1], (const unsigned char *)"sandbox agent: ", 15);
    keep_add(&c->kept[1], (const unsigned char *)what, sizeof what - 1);
    keep_add(&c->kept[1], (const unsigned char *)"\n", 1);
}

void started(struct command *c, pid_t pid, const int theirs[3]) {
    int error = errno;
    close_theirs(theirs, 3);
    if (pid < 0) {
        not_started(c, error);
        return;
    }
    c->pid = pid;
    if (c->in >= 0)
        command_watch(c, 0, 0, true);
    if (!c->watch_us)
        output_watch(c);
}

/* ---- commands --------------------------------------------------------------------------------------- */

static bool overridden(const char *entry, char *const *entries, size_t count) {
    size_t name = (size_t)(strchrnul(entry, '=') - entry);
    for (size_t i = 0; i < count; i++)
        if (strncmp(entries[i], entry, name) == 0 && entries[i][name] == '=')
            return true;
    return false;
}

/* The given entries, then those of our own environment they do not replace, then what no program should
 * miss. `merged` has room for all of them. */
static void merge(char **merged, char *const *given, size_t count) {
    static char home_root[] = "HOME=/root", home[] = "HOME=/";
    static char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    char *defaults[] = {path, geteuid() == 0 ? home_root : home};
    size_t size = 0;
    for (; size < count; size++)
        merged[size] = given[size];
    for (char **own = self.environment; *own; own++)
        if (!overridden(*own, given, count))
            merged[size++] = *own;
    for (size_t i = 0; i < 2; i++)
        if (!overridden(defaults[i], merged, size))
            merged[size++] = defaults[i];
    merged[size] = NULL;
}

static size_t count_own(void) {
    size_t count = 0;
    while (self.environment[count])
        count++;
    return count;
}

bool read_request(struct request *q, const unsigned char *payload, size_t size) {
    struct reader r = {payload, payload + size, true};
    q->flags = *take_bytes(&r, 1);
    q->timeout_ms = get32(take_bytes(&r, 4));
    q->max_output = get32(take_bytes(&r, 4));
    q->columns = get32(take_bytes(&r, 4));
    q->rows = get32(take_bytes(&r, 4));
    q->argc = get32(take_bytes(&r, 4));
    q->envc = get32(take_bytes(&r, 4));
    q->cwd = take_string(&r);
    q->tag = take_string(&r);
    if (!r.good || strlen(q->tag) > TAG_MAX || q->argc < 1 || q->argc > STRINGS_MAX || q->envc > STRINGS_MAX)
        return false;
    q->argv = calloc(q->argc + 1, sizeof(char *));
    q->given = calloc(q->envc + 1, sizeof(char *));
    q->env = calloc(q->envc + count_own() + 3, sizeof(char *));
    if (!q->argv || !q->given || !q->env)
        return false;
    for (size_t i = 0; i < q->argc; i++)
        q->argv[i] = take_string(&r);
    for (size_t i = 0; i < q->envc && r.good; i++)
        if ((q->given[i] = take_string(&r)) && !strchr(q->given[i], '='))
            r.good = false;
    if (r.good)
        merge(q->env, q->given, q->envc);
    return r.good && r.at == r.end;
}

void free_request(struct request *q) {
    free(q->argv);
    free(q->given);
    free(q->env);
}

/* One terminal for all three; ours are copies of its master, since each is watched and closed by itself. */
static bool open_terminal(struct command *c, const struct request *q, int theirs[3]) {
    theirs[1] = theirs[2] = -1;
    if (!pty_open(&c->master, &theirs[0], q->columns, q->rows))
        return false;
    c->out[0] = fcntl(c->master, F_DUPFD_CLOEXEC, 3);
    c->in = q->flags & WITH_STDIN ? fcntl(c->master, F_DUPFD_CLOEXEC, 3) : -1;
    return c->out[0] >= 0 && (c->in >= 0 || !(q->flags & WITH_STDIN));
}

static void start(uint32_t id, const struct request *q, const unsigned char *frame, size_t size) {
    int theirs[3];
    bool piped = !(q->flags & WITH_PTY), stdin_piped = piped && (q->flags & WITH_STDIN);
    struct command *c = prepare(J_EXEC, id, stdin_piped, piped, piped, theirs);
    if (!c)
        return;
    if (!piped && !open_terminal(c, q, theirs)) {
        wire_fail(id, errno, "cannot open a terminal");
        close_theirs(theirs, 3);
        command_free(c);
        return;
    }
    strcpy(c->tag, q->tag);
    for (unsigned which = 0; which < 2; which++)
        c->kept[which] = (struct keep){.cap = q->max_output, .head = q->max_output / 2};
    c->push = c->announce = q->flags & PUSH;
    c->stdin_eof = !(q->flags & WITH_STDIN);
    if (q->timeout_ms)
        c->deadline_us = c->started_us + (int64_t)q->timeout_ms * 1000;
    struct program program = {.cwd = *q->cwd ? q->cwd : NULL, .argv = q->argv, .env = q->env, .in = theirs[0]};
    program.out = piped ? theirs[1] : theirs[0];
    program.err = piped ? theirs[2] : theirs[0];
    program.announce = c->announce;
    program.tty = !piped;
    if (piped && !c->push) {
        program.frame = frame;
        program.frame_size = size;
        c->watch_us = c->started_us + WATCH_AFTER_US;
    }
    started(c, launch(command_slot(c), &program), theirs);
}

void exec_frame(uint32_t id, const unsigned char *payload, size_t size) {
    struct request q = {0};
    if (read_request(&q, payload, size))
        start(id, &q, payload, size);
    else
        wire_fail(id, EINVAL, "the command is malformed, or has too many arguments");
    free_request(&q);
}

/* ---- files ------------------------------------------------------------------------------------------ */

/* NULL, and said, when the request had not been read to its end, or cannot be served. */
static struct command *prepare_file(enum job job, uint32_t id, const struct reader *r, int theirs[3]) {
    if (!r->good || r->at != r->end) {
        wire_fail(id, EINVAL, "the request is malformed");
        return NULL;
    }
    return prepare(job, id, job == J_WRITE, job == J_READ, false, theirs);
}

void write_frame(uint32_t id, const unsigned char *payload, size_t size) {
    struct reader r = {payload, payload + size, true};
    mode_t mode = get32(take_bytes(&r, 4));
    bool parents = *take_bytes(&r, 1) & 1;
    uint64_t count = get64(take_bytes(&r, 8));
    const char *path = take_string(&r);
    int theirs[3];
    struct command *c = prepare_file(J_WRITE, id, &r, theirs);
    if (!c)
        return;
    pid_t pid = launch_helper(theirs[0], theirs[1]);
    if (pid == 0)
        file_write(command_slot(c), path, mode, parents, count);
    started(c, pid, theirs);
}

void read_frame(uint32_t id, const unsigned char *payload, size_t size) {
    struct reader r = {payload, payload + size, true};
    uint64_t limit = get64(take_bytes(&r, 8));
    const char *path = take_string(&r);
    int theirs[3];
    struct command *c = prepare_file(J_READ, id, &r, theirs);
    if (!c)
        return;
    pid_t pid = launch_helper(theirs[0], theirs[1]);
    if (pid == 0)
        file_read(command_slot(c), path, limit);
    started(c, pid, theirs);
}

/* ---- archives --------------------------------------------------------------------------------------- */

void pack_frame(uint32_t id, const unsigned char *payload, size_t size) {
    struct reader r = {payload, payload + size, true};
    uint64_t limit = get64(take_bytes(&r, 8));
    const char *path = take_string(&r);
    int theirs[3];
    struct command *c = prepare_file(J_READ, id, &r, theirs);
    if (!c)
        return;
    c->windowed = true;
    c->window = PUSH_WINDOW;
    pid_t pid = launch_helper(theirs[0], theirs[1]);
    if (pid == 0)
        tar_out(command_slot(c), path, limit);
    started(c, pid, theirs);
}

void unpack_frame(uint32_t id, const unsigned char *payload, size_t size) {
    struct reader r = {payload, payload + size, true};
    uint64_t limit = get64(take_bytes(&r, 8)), entries = get64(take_bytes(&r, 8));
    char *path = take_string(&r);
    int theirs[3];
    struct command *c = prepare_file(J_WRITE, id, &r, theirs);
    if (!c)
        return;
    pid_t pid = launch_helper(theirs[0], theirs[1]);
    if (pid == 0)
        tar_in(command_slot(c), path, limit, entries);
    started(c, pid, theirs);
}
