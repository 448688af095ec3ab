/* Feeds frames, and what programs do meanwhile, through the agent's real parser, buffers and event loop.
 *
 * Everything of the agent is compiled in but what children run: no process is started, no signal is sent, and
 * time and /proc are ours. The connection is a real socket: the agent dials it as it dials a server.
 * An input is a list of steps (`step` below), so that the fuzzer can also end programs, write their output,
 * stop reading, hang up, and let time pass. Built and run by `python -m fuzz`, i.e. `make fuzz`.
 */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>

static int64_t clock_us = 1000000;

static int fuzz_clock(clockid_t which, struct timespec *t) {
    (void)which;
    *t = (struct timespec){clock_us / 1000000, clock_us % 1000000 * 1000};
    return 0;
}

static int fuzz_kill(int pid, int number) {
    (void)pid, (void)number;
    return 0;
}

static int fuzz_wait(int poller, struct epoll_event *events, int most, int timeout) {
    (void)timeout;
    return epoll_pwait(poller, events, most, 0, NULL);
}

static DIR *fuzz_opendir(const char *path);

#define main agent_main
#define kill fuzz_kill
#define clock_gettime fuzz_clock
#define epoll_wait fuzz_wait
#define opendir fuzz_opendir
#include "agent.c"
#include "command.c"
#include "output.c"
#undef GRACE
#include "held.c"
#include "jobs.c"
#include "keep.c"
#include "pty.c"
#include "report.c"
#define ask ask_shell
#define begin begin_run
#define set_up set_up_shell
#include "session.c"
#undef ask
#undef begin
#undef set_up
#define count count_processes
#define list list_of_processes
#define hold hold_all
#define release release_all
#define find find_process
#include "tree.c"
#undef count
#undef list
#undef hold
#undef release
#undef find
#include "wire.c"
#undef kill
#undef opendir

#define PROGRAMS 64

static struct { int out[2], in, status; struct slot *slot; } programs[PROGRAMS];
static unsigned started_programs;
static int listener, server = -1;
static char place[] = "/tmp/fuzz-agent-XXXXXX";

static DIR *fuzz_opendir(const char *path) {
    (void)path;
    return opendir(place);
}

/* What launch.c would do in a child: keep the program's ends. */
static pid_t begin_program(struct slot *slot, int in, int out, int err, int status) {
    unsigned n = started_programs++;
    if (n >= PROGRAMS)
        return -1;
    programs[n].in = fcntl(in, F_DUPFD_CLOEXEC, 3);
    programs[n].out[0] = fcntl(out, F_DUPFD_CLOEXEC, 3);
    programs[n].out[1] = fcntl(err, F_DUPFD_CLOEXEC, 3);
    programs[n].status = status < 0 ? -1 : fcntl(status, F_DUPFD_CLOEXEC, 3);
    for (int *fd = (int[]){programs[n].in, programs[n].out[0], programs[n].out[1], -1}; *fd >= 0; fd++)
        fcntl(*fd, F_SETFL, O_NONBLOCK);
    programs[n].slot = slot;
    return (pid_t)(1000 + n);
}

pid_t launch(struct slot *slot, const struct program *p) {
    if (!p->shell)
        return begin_program(slot, p->in, p->out, p->err, -1);
    int err = p->handed[ERR] >= 0 ? p->handed[ERR] : p->handed[OUT];
    return begin_program(slot, p->in, p->handed[OUT], err, p->handed[STATUS]);
}

void resident_free(pid_t supervisor) {
    (void)supervisor;
}

void resident_gone(pid_t supervisor) {
    (void)supervisor;
}

void resident_end(pid_t supervisor) {
    fuzz_kill(supervisor, SIGKILL);
}

void resident_end_all(void) {
    fuzz_kill(-1, SIGKILL);
}

bool resident_idle(pid_t process) {
    (void)process;
    return false;
}

pid_t launch_helper(int in, int out) {
    return begin_program(&slots[SLOTS - 1], in, out, out, -1);
}

void confine(void) {
}

void close_from(int first) {
    (void)first;
}

_Noreturn void file_end(struct slot *slot, int error, const char *what, uint64_t value) {
    (void)slot, (void)error, (void)what, (void)value;
    abort(); /* file work is only done in children */
}
void make_directory(char *path) {
    (void)path;
}
_Noreturn void file_write(struct slot *s, const char *p, mode_t m, bool q, uint64_t n) {
    (void)p, (void)m, (void)q;
    file_end(s, 0, 0, n);
}
_Noreturn void file_read(struct slot *s, const char *p, uint64_t n) {
    (void)p;
    file_end(s, 0, 0, n);
}
_Noreturn void tar_out(struct slot *s, const char *p, uint64_t n) {
    (void)p;
    file_end(s, 0, 0, n);
}
_Noreturn void tar_in(struct slot *s, char *p, uint64_t n, uint64_t e) {
    (void)p, (void)e;
    file_end(s, 0, 0, n);
}

/* ---- the world around it ---------------------------------------------------------------------------- */

static void write_file(const char *directory, const char *name, const char *text) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", place, directory);
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/%s/%s", place, directory, name);
    FILE *file = fopen(path, "w");
    if (!file || fputs(text, file) < 0)
        abort();
    fclose(file);
}

static void build_world(void) {
    char path[128], text[256];
    if (!mkdtemp(place))
        abort();
    snprintf(path, sizeof path, "%s/self", place);
    if (symlink("/proc/self", path) != 0)
        abort();
    write_file(".", "loadavg", "0 0 0 1/1 1500");
    for (int pid = 1000; pid < 1008; pid++) {
        char name[16];
        snprintf(name, sizeof name, "%d", pid);
        snprintf(text, sizeof text, "%d (a) b) S %d 0 0 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 %d", pid,
                 pid < 1004 ? 1 : pid - 4, 90 + pid % 20);
        write_file(name, "stat", text);
    }
    static char *environment[] = {(char *)(uintptr_t)"A=1", NULL};
    self.environment = environment;
    self.max_commands = 24;
    self.memory_left = self.memory_most = 1 << 20;
    struct sigaction own[65]; /* the fuzzer's: what the agent makes of them would end it at its first alarm */
    for (int s = 1; s <= 64; s++)
        sigaction(s, NULL, &own[s]);
    set_up();
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (int s = 1; s <= 64; s++)
        if (s != SIGPIPE)
            sigaction(s, &own[s], NULL);
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    snprintf(at.sun_path, sizeof at.sun_path, "%s/agent.sock", place);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) != 0 || listen(listener, 64) != 0)
        abort();
    wire_open(at.sun_path, INT64_MAX / 4);
}

static void tell_agent(const void *bytes, size_t size) {
    if (server >= 0 && send(server, bytes, size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno == EPIPE) {
        close(server);
        server = -1;
    }
}

static void connect_again(void) {
    if (server >= 0)
        close(server);
    server = -1;
    for (int i = 0; i < 50 && server < 0; i++) {
        turn();
        clock_us += 200000;
        server = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    }
    unsigned char welcome_frame[13];
    put32(welcome_frame, 9);
    welcome_frame[4] = F_WELCOME;
    put32(welcome_frame + 5, 0);
    put32(welcome_frame + 9, PROTOCOL);
    tell_agent(welcome_frame, sizeof welcome_frame);
    turn();
}

/* ---- steps ------------------------------------------------------------------------------------------ */

struct input {
    const uint8_t *at;
    size_t size;
};

static unsigned next(struct input *in) {
    if (!in->size)
        return 0;
    in->size--;
    return *in->at++;
}

static const uint8_t *bytes(struct input *in, size_t *count) {
    *count = *count < in->size ? *count : in->size;
    const uint8_t *from = in->at;
    in->at += *count;
    in->size -= *count;
    return from;
}

static void send_frame(struct input *in) {
    static unsigned char frame[70000];
    static const unsigned char kinds[] = {F_EXEC, F_DATA,   F_CANCEL, F_WRITE,   F_READ, F_PING,   F_KILL_ALL, F_OPEN, F_RUN,
                                          F_SIGNAL, F_RESIZE, F_ATTACH, F_RELEASE, F_PACK, F_UNPACK, F_ACK};
    unsigned kind = next(in), id = next(in) % 12, scale = next(in);
    size_t size = next(in) | (scale & 7) << 8;
    const uint8_t *payload = bytes(in, &size);
    size_t repeat = scale & 128 ? 30 : 1;
    size_t total = 0;
    for (size_t i = 0; i < repeat && total + size < sizeof frame - 9; i++, total += size)
        memcpy(frame + 9 + total, payload, size);
    put32(frame, (uint32_t)(total + 5));
    frame[4] = kind < 240 ? kinds[kind % sizeof kinds] : (unsigned char)kind;
    put32(frame + 5, id);
    tell_agent(frame, total + 9);
}

static void end_program(unsigned n, unsigned how) {
    if (n >= started_programs || n >= PROGRAMS || !programs[n].slot)
        return;
    atomic_store(&programs[n].slot->root, (int)(2000 + n));
    if (how & 1) {
        programs[n].slot->status = (int)(how << 7 & 0xff00) | (how & 2 ? 9 : 0);
        programs[n].slot->what = how & 4 ? "it never started" : NULL;
        atomic_store(&programs[n].slot->done, 1);
    }
    command_bell();
    if (how & 8) {
        command_reaped((pid_t)(1000 + n), 0);
        programs[n].slot = NULL;
    }
}

static void program_acts(struct input *in, unsigned n) {
    static const char much[20000];
    unsigned how = next(in);
    if (n >= started_programs || n >= PROGRAMS)
        return;
    char line[64];
    int fd = programs[n].out[how & 1];
    size_t size = how & 64 ? sizeof much : how & 63;
    if (how & 128 && programs[n].status >= 0) {
        int length = snprintf(line, sizeof line, "%u %u\n", next(in), next(in) % 8);
        fd = programs[n].status;
        if (write(fd, line, (size_t)length) < 0)
            return;
    } else if (fd >= 0 && write(fd, much, size) < 0) {
        return;
    }
    if ((how & 0x3e) == 0x3e && fd >= 0 && fd == programs[n].out[how & 1]) {
        close(fd);
        programs[n].out[how & 1] = -1;
    }
}

static void step(struct input *in) {
    static char sink[200000];
    unsigned what = next(in);
    size_t size = next(in);
    switch (what % 10) {
    case 0: {
        const uint8_t *raw = bytes(in, &size);
        tell_agent(raw, size);
        break;
    }
    default:
        send_frame(in);
        break;
    case 4:
        end_program((unsigned)size % 16, next(in));
        break;
    case 5:
        program_acts(in, (unsigned)size % 16);
        break;
    case 6:
        clock_us += (int64_t)size * size * 500;
        break;
    case 7:
        while (server >= 0 && recv(server, sink, sizeof sink, MSG_DONTWAIT) > 0)
            turn();
        break;
    case 8:
        if (size < 32 || server < 0)
            connect_again();
        break;
    }
    turn();
}

static void clean_up(void) {
    if (server >= 0)
        close(server);
    server = -1;
    for (int i = 0; i < 3; i++)
        turn();
    for (unsigned i = 0; i < SLOTS; i++)
        if (commands[i].job) {
            commands[i].pid = 0;
            command_free(&commands[i]);
        }
    if (self.memory_left != self.memory_most || used)
        abort(); /* bytes of kept output were lost count of */
    for (unsigned n = 0; n < started_programs && n < PROGRAMS; n++) {
        close(programs[n].in);
        close(programs[n].out[0]);
        close(programs[n].out[1]);
        close(programs[n].status);
    }
    started_programs = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool built;
    if (!built)
        build_world();
    built = true;
    struct input in = {data, size};
    connect_again();
    for (int i = 0; i < 400 && in.size; i++)
        step(&in);
    clean_up();
    return 0;
}
