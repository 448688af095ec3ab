/* Sessions: a shell that stays, and the commands it is given.
 *
 * The shell is interactive, so that SIGINT takes it back to its next command whatever it was doing. It reads
 * from a pipe what we write there: for every command two lines,
 *
 *     . /proc/self/fd/240 <in >out 2>err       240 is a memory file that holds the text of the command
 *     echo "$? SEQUENCE" >/proc/self/fd/243    the status comes back beside the output, never in it
 *
 * (A variable says when the first of them runs: bash can crash when the trap that makes it leave a command
 * finds it reading the next.)
 *
 * The text is never typed or quoted, may have any size, and a syntax error in it is a status like another.
 * The pipe keeps the two lines apart (O_DIRECT), since a shell that is interrupted throws away what it has
 * read and not yet run: the second line is still in the pipe. What the shell itself says (prompts, notices)
 * goes to /dev/null. A session has a terminal only when one is asked for; without one a program that wants
 * to ask something there fails at once instead of waiting.
 *
 * Code in a session can say about its own session what it likes: it is its own shell. Other sessions have
 * descriptors of their own; that processes of one user can reach into each other is beyond us.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define NOISE 16384         /* of what background jobs say between two commands */
#define LEAVE 59            /* signals that nothing uses: their traps make the shell leave the command, */
#define ABORT 60            /* this one also where the session ignores SIGINT */
#define ASK_AGAIN_US 3000  /* a shell that was made to leave a command may have left our question, too */
#define YOUNG_US 200000
#define GIVE_UP_US 1500000

enum { TEXT, OUT, ERR, STATUS, NOTHING, IN };

/* ignoreeof: a busybox shell takes a signal that finds it reading for the end of its input. */
static const char set_up[] =
    "PS1='$ ' PS2= PS4='+ '; [ \"$BASH_VERSION\" ] && set +o history +H; set -o ignoreeof; "
    "unset HISTFILE MAILCHECK TMOUT; trap '[ \"$_orchestrate\" != run ] || kill -INT $$' 59; "
    "trap '[ \"$_orchestrate\" != run ] || { trap - INT; kill -INT $$; }' 60\n";

struct shell {
    int control, text, status, in;
    size_t filled;
    char line[64];
};

static bool tell(const struct shell *s, const char *line) {
    return write(s->control, line, strlen(line)) == (ssize_t)strlen(line);
}

static bool ask(const struct shell *s, uint32_t sequence) {
    char line[128];
    snprintf(line, sizeof line, "_orchestrate=$?; \\command echo \"$_orchestrate %u\" >/proc/self/fd/%d\n",
             sequence, HANDED_FIRST + STATUS);
    return tell(s, line);
}

static pid_t shell_pid(const struct command *c) {
    return atomic_load(&command_slot(c)->root);
}

/* ---- opening ---------------------------------------------------------------------------------------- */

static bool open_output(struct command *c, const struct request *q, int handed[HANDED]) {
    if (!(q->flags & WITH_PTY))
        return open_pipe(&c->out[0], &handed[OUT], true) && open_pipe(&c->out[1], &handed[ERR], true);
    if (!pty_open(&c->master, &handed[OUT], q->columns, q->rows))
        return false;
    pty_plain(handed[OUT]);
    return (c->out[0] = fcntl(c->master, F_DUPFD_CLOEXEC, 3)) >= 0;
}

/* `from` is the shell's end of the control pipe. */
static bool open_ends(struct command *c, const struct request *q, int *from, int handed[HANDED]) {
    struct shell *s = c->shell;
    if (!s || !open_pipe(&s->control, from, false) || !open_pipe(&s->status, &handed[STATUS], true))
        return false;
    int fds[2];
    if (fcntl(s->control, F_SETFL, O_NONBLOCK | O_DIRECT) != 0 || pipe2(fds, O_CLOEXEC) != 0)
        return false;
    s->in = fds[0];
    handed[IN] = tree_reopen(fds[0], O_RDONLY); /* another description: ours does not block, theirs does */
    close(fds[1]);
    if (fcntl(s->in, F_SETFL, O_NONBLOCK) != 0)
        return false;
    s->text = handed[TEXT] = memfd_create("command", MFD_CLOEXEC);
    return s->text >= 0 && handed[IN] >= 0 && open_output(c, q, handed);
}

static void close_handed(const struct command *c, int from, int handed[HANDED]) {
    handed[NOTHING] = -1;
    if (c->shell && handed[TEXT] == c->shell->text)
        handed[TEXT] = -1;
    close_theirs(handed, HANDED);
    close_theirs(&from, 1);
}

static void open_session(uint32_t id, const struct request *q) {
    int theirs[3], from = -1, handed[HANDED] = {-1, -1, -1, -1, self.null, -1};
    struct command *c = prepare(J_SHELL, id, false, false, false, theirs);
    if (!c)
        return;
    strcpy(c->tag, q->tag);
    c->announce = true;
    c->stdin_eof = true;
    for (unsigned which = 0; which < 2; which++)
        c->kept[which] = (struct keep){.cap = NOISE, .head = NOISE / 2};
    if ((c->shell = malloc(sizeof *c->shell)))
        *c->shell = (struct shell){-1, -1, -1, -1, 0, ""};
    if (!open_ends(c, q, &from, handed)) {
        wire_fail(id, errno, "cannot open what a session needs (pipes, memory file, terminal)");
        close_handed(c, from, handed);
        command_free(c);
        return;
    }
    struct program program = {.cwd = *q->cwd ? q->cwd : NULL, .argv = q->argv, .env = q->env, .in = from};
    program.out = program.err = self.null;
    program.shell = true;
    program.tty = c->master >= 0;
    memcpy(program.handed, handed, sizeof handed);
    started(c, launch(command_slot(c), &program), theirs);
    close_handed(c, from, handed);
    watch(c->shell->status, EPOLLIN, (uint64_t)(c - commands) * 4 + 3, true);
    tell(c->shell, set_up);
    ask(c->shell, 0);
}

void open_frame(uint32_t id, const unsigned char *payload, size_t size) {
    struct request q = {0};
    if (read_request(&q, payload, size))
        open_session(id, &q);
    else
        wire_fail(id, EINVAL, "the session is malformed, or has too many variables");
    free_request(&q);
}

void session_free(struct command *c) {
    struct shell *s = c->shell;
    if (!s)
        return;
    forget(s->status);
    close_theirs((const int[]){s->control, s->text, s->in}, 3);
    free(s);
    c->shell = NULL;
}

/* ---- running ---------------------------------------------------------------------------------------- */

static bool write_text(int fd, const unsigned char *text, size_t size) {
    if (ftruncate(fd, 0) != 0)
        return false;
    for (size_t at = 0; at < size;) {
        ssize_t put = pwrite(fd, text + at, size - at, (off_t)at);
        if (put <= 0)
            return false;
        at += (size_t)put;
    }
    return true;
}

/* What an earlier command left unread is no business of this one. */
static bool open_stdin(struct command *c, const struct command *session) {
    static char rest[4096];
    const struct shell *s = session->shell;
    c->stdin_eof = false;
    if (session->master >= 0) {
        c->master = fcntl(session->master, F_DUPFD_CLOEXEC, 3);
        c->in = fcntl(session->master, F_DUPFD_CLOEXEC, 3);
        return c->in >= 0 && c->master >= 0;
    }
    while (read(s->in, rest, sizeof rest) > 0)
        continue;
    c->in = tree_reopen(s->in, O_WRONLY | O_NONBLOCK);
    return c->in >= 0;
}

static bool tell_command(const struct command *session, const struct command *c) {
    static const char say[] = "_orchestrate=run; . /proc/self/fd/%d </proc/self/fd/%d >/proc/self/fd/%d 2>";
    bool terminal = session->master >= 0;
    int from = HANDED_FIRST + (terminal ? OUT : c->in >= 0 ? IN : NOTHING);
    char line[160];
    int size = snprintf(line, sizeof line, say, HANDED_FIRST + TEXT, from, HANDED_FIRST + OUT);
    if (terminal)
        snprintf(line + size, sizeof line - (size_t)size, "&1\n");
    else
        snprintf(line + size, sizeof line - (size_t)size, "/proc/self/fd/%d\n", HANDED_FIRST + ERR);
    return tell(session->shell, line) && ask(session->shell, c->sequence);
}

static void begin(struct command *session, struct command *c, uint32_t flags, const struct reader *text) {
    c->peer = session;
    c->parent = session->id;
    c->push = flags & PUSH;
    c->stdin_eof = true;
    c->born_tick = tree_now();
    c->born_pid = tree_last_pid();
    c->sequence = session->sequence++;
    bool takes_input = flags & WITH_STDIN || session->master >= 0;
    bool good = write_text(session->shell->text, text->at, (size_t)(text->end - text->at));
    good = good && (!takes_input || open_stdin(c, session));
    /* EPIPE: the shell is ending, perhaps by this very command; its supervisor is about to say so. */
    if (!good || (!tell_command(session, c) && errno != EPIPE)) {
        wire_fail(c->id, errno, "the session's shell cannot be told");
        command_free(c);
        return;
    }
    if (c->in >= 0)
        command_watch(c, 0, 0, true);
    session->peer = c;
    for (unsigned which = 0; which < 2; which++)
        keep_move(&c->kept[which], &session->kept[which]);
    for (unsigned which = 0; which < 2; which++)
        session->kept[which] = (struct keep){.cap = NOISE, .head = NOISE / 2};
}

void run_frame(uint32_t id, const unsigned char *payload, size_t size) {
    struct reader r = {payload, payload + size, true};
    struct command *session = command_find(get32(take_bytes(&r, 4)));
    uint32_t flags = *take_bytes(&r, 1), timeout_ms = get32(take_bytes(&r, 4));
    uint32_t max_output = get32(take_bytes(&r, 4));
    const char *tag = take_string(&r);
    int theirs[3];
    if (!r.good || strlen(tag) > TAG_MAX) {
        wire_fail(id, EINVAL, "the request is malformed");
        return;
    }
    if (!session || session->job != J_SHELL || session->state != S_RUNNING || !session->sequence) {
        wire_fail(id, ESRCH, "there is no such session, or it has ended");
        return;
    }
    if (session->peer) {
        wire_fail(id, EBUSY, "the session is still running a command: wait for it, interrupt it, or open another");
        return;
    }
    struct command *c = prepare(J_RUN, id, false, false, false, theirs);
    if (!c)
        return;
    strcpy(c->tag, tag);
    for (unsigned which = 0; which < 2; which++)
        c->kept[which] = (struct keep){.cap = max_output, .head = max_output / 2};
    if (timeout_ms)
        c->deadline_us = c->started_us + (int64_t)timeout_ms * 1000;
    begin(session, c, flags, &r);
}

/* ---- ending ----------------------------------------------------------------------------------------- */

static void command_reported(struct command *c, int code) {
    atomic_store(&command_slot(c)->done, 1);
    if (c->state != S_RUNNING)
        return; /* being killed: settled when nothing of it is left */
    c->status = (code & 255) << 8;
    c->took_us = now_us() - c->started_us;
    command_settle(c);
}

static void take_line(struct command *session, const char *line) {
    char *rest;
    long code = strtol(line, &rest, 10);
    unsigned long sequence = strtoul(rest, NULL, 10);
    if (rest == line)
        return;
    if (sequence == 0 && session->sequence == 0)
        session->sequence = 1; /* it has started; the server hears of it */
    else if (session->peer && session->peer->sequence == sequence)
        command_reported(session->peer, (int)code);
}

void session_status(struct command *session) {
    struct shell *s = session->shell;
    if (session->job != J_SHELL || !s || s->status < 0)
        return;
    ssize_t got = read(s->status, s->line + s->filled, sizeof s->line - 1 - s->filled);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) {
        forget(s->status);
        s->status = -1;
    }
    if (got <= 0)
        return;
    s->filled += (size_t)got;
    s->line[s->filled] = 0;
    for (char *end; (end = strchr(s->line, '\n'));) {
        *end = 0;
        take_line(session, s->line);
        s->filled -= (size_t)(end + 1 - s->line);
        memmove(s->line, end + 1, s->filled + 1);
    }
    if (s->filled == sizeof s->line - 1)
        s->filled = 0; /* no shell says this much: nonsense of code in the session */
}

/* The command is over: what it wrote is in the pipes now, and is its own. */
void session_leave(struct command *run) {
    if (!run->peer)
        return;
    output_drain(run->peer);
    run->peer->peer = NULL;
    run->peer = NULL;
}

/* The shell is gone, and what it ran with it. */
void session_ended(struct command *session) {
    struct command *run = session->peer;
    if (!run)
        return;
    if (run->state != S_KILLING)
        run->status = session->status;
    run->flags |= ENDED | (session->flags & KILLED);
    command_settle(run);
}

/* Only when it has read all there is: what is still in the pipe it will come to. */
static void ask_again(const struct command *run) {
    int waiting = 1;
    if (!atomic_load(&command_slot(run)->done) &&
        ioctl(run->peer->shell->control, FIONREAD, &waiting) == 0 && waiting == 0)
        ask(run->peer->shell, run->sequence);
}

/* As a terminal does it; and the shell is told by itself, since SIGINT alone it may take for its child's,
 * or get in the wrong moment, and go on with the rest of the text. */
void session_interrupt(struct command *run, uint32_t grace_ms) {
    if (run->state != S_RUNNING)
        return;
    pid_t shell = shell_pid(run->peer);
    if (shell > 1)
        kill(shell, LEAVE);
    if (run->peer->master >= 0)
        ioctl(run->peer->master, TIOCSIG, SIGINT); /* to what is in the foreground */
    else if (shell > 1)
        kill(-shell, SIGINT);
    run->told_tick = tree_now();
    run->kill_us = now_us();
    run->phase_us = run->kill_us + ASK_AGAIN_US;
    run->grace_us = run->kill_us + (int64_t)grace_ms * 1000;
}

/* After it nothing more of the text is run: the trap comes before the shell's next step. */
void session_abort(struct command *run) {
    pid_t shell = run->peer ? shell_pid(run->peer) : 0;
    if (shell > 1) {
        kill(shell, ABORT);
        kill(shell, SIGINT); /* for a shell that waits for input itself */
    }
    run->grace_us = now_us() + ASK_AGAIN_US;
}

/* A process that was being started when the others were told may have lost its SIGINT on the way from the
 * shell's copy to the program: those as young as that are told again, for a moment. */
static int64_t interrupted_tick(struct command *run, int64_t now) {
    if (now >= run->grace_us) {
        command_doom(run, KILLED);
        return run->grace_us;
    }
    if (now >= run->phase_us) {
        ask_again(run);
        if (now - run->kill_us < YOUNG_US)
            tree_signal(run, SIGINT, run->told_tick - 1);
        run->phase_us = now + (now - run->kill_us < ASK_AGAIN_US ? ASK_AGAIN_US : now - run->kill_us);
    }
    return run->phase_us < run->grace_us ? run->phase_us : run->grace_us;
}

/* When to call again, or 0. */
int64_t session_tick(struct command *run, int64_t now) {
    if (run->state > S_KILLING || !run->peer || !run->grace_us)
        return 0;
    if (run->state == S_RUNNING)
        return interrupted_tick(run, now);
    if (now < run->grace_us)
        return run->grace_us;
    if (now - run->kill_us > GIVE_UP_US) {
        command_doom(run->peer, KILLED);
        return 0;
    }
    ask_again(run);
    run->grace_us = now + ASK_AGAIN_US;
    return run->grace_us;
}
