/* The sandbox agent. Usage: agent [--orphan-timeout SECONDS] [--memory-mb MB] [--tasks N] [--workdir DIR]
 * SOCKET
 *
 * Connects to SOCKET and serves commands and files (frames.py has the protocol). It must be PID 1 of a pid
 * namespace: then nothing inside can kill or stop it, its end ends every process, and kill(-1) means this
 * sandbox and nothing else. One thread, one epoll loop, nothing in it blocks.
 * It does not authenticate: the server checks whose process connects, and nobody else can reach the socket.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define DESCRIPTORS_SPARE 32
#define DESCRIPTORS_EACH 6 /* three for a running command, as many for what finished ones leave behind */

struct self self;
int bell;
static int poller, signals;
static bool signalled;

int64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

uint32_t get32(const unsigned char *at) {
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

uint64_t get64(const unsigned char *at) {
    return get32(at) | (uint64_t)get32(at + 4) << 32;
}

unsigned char *put32(unsigned char *at, uint32_t value) {
    for (int shift = 0; shift < 32; shift += 8)
        *at++ = (unsigned char)(value >> shift);
    return at;
}

unsigned char *put64(unsigned char *at, uint64_t value) {
    return put32(put32(at, (uint32_t)value), (uint32_t)(value >> 32));
}

void watch(int fd, uint32_t events, uint64_t tag, bool add) {
    struct epoll_event event = {.events = events, .data.u64 = tag};
    epoll_ctl(poller, add ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
}

/* Explicitly, before close: a child may hold a copy for a moment, and epoll would go on reporting it. */
void forget(int fd) {
    if (fd < 0)
        return;
    epoll_ctl(poller, EPOLL_CTL_DEL, fd, NULL);
    close(fd);
}

/* As PID 1 our exit alone makes the kernel kill everything and wait for it. */
void end_everything(void) {
    kill(-1, SIGKILL);
    _exit(0);
}

static _Noreturn void fail(const char *message) {
    if (write(2, message, strlen(message)) < 0)
        _exit(3);
    _exit(2);
}

/* A signal from outside the namespace has no sender pid; one from inside does, and is not obeyed. */
static void take_signals(void) {
    struct signalfd_siginfo info;
    signalled = true;
    while (read(signals, &info, sizeof info) == sizeof info)
        if (info.ssi_signo != SIGCHLD && info.ssi_code == SI_USER && info.ssi_pid == 0)
            end_everything();
}

static void reap(void) {
    int status;
    pid_t pid;
    signalled = false;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        command_reaped(pid, status);
    if (pid < 0 && errno == ECHILD)
        command_no_children();
}

static void dispatch(uint64_t tag, uint32_t events) {
    uint64_t rung;
    if (tag == TAG_SOCKET)
        wire_event(events);
    else if (tag == TAG_SIGNAL)
        take_signals();
    else if (tag == TAG_BELL && read(bell, &rung, sizeof rung) == sizeof rung)
        command_bell();
    else if (tag < TAG_BELL)
        command_event((unsigned)(tag / 4), (unsigned)(tag % 4), events);
}

/* Milliseconds until `next`, rounded up; 0 means never. */
static int until(int64_t next) {
    int64_t left = next - now_us();
    if (!next)
        return -1;
    return left <= 0 ? 0 : left > 60000000 ? 60000 : (int)((left + 999) / 1000);
}

static void turn(void) {
    int64_t a = command_tick(now_us());
    bool waiting = command_pump();
    wire_flush();
    int64_t b = wire_tick(now_us()); /* last: flushing may find that the connection is gone */
    /* Flushing made room that nothing will wake us for. */
    bool again = waiting && wire_room() >= CHUNK + REPLY_ROOM;
    struct epoll_event events[64];
    int ready = epoll_wait(poller, events, 64, again ? 0 : until(a && (!b || a < b) ? a : b));
    for (int i = 0; i < ready; i++)
        dispatch(events[i].data.u64, events[i].events);
    if (signalled || command_killing_all()) /* without a child there is no signal either */
        reap();
}

static void protect(void) {
    prctl(PR_SET_DUMPABLE, 0); /* no ptrace, no /proc/1/{mem,fd,environ} for code of the sandbox */
    self.nice = setpriority(PRIO_PROCESS, 0, -10) == 0; /* where allowed: a fork bomb must not starve us */
    char text[16] = "";
    int fd = open("/proc/self/oom_score_adj", O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && read(fd, text, sizeof text - 1) > 0)
        self.oom = text[0] == '-' ? "0" : atoi(text) < 100 ? "100" : NULL; /* programs go before us */
    if (fd >= 0)
        close(fd);
}

static void count_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        fail("agent: cannot read the limit of open files\n");
    self.nofile_soft = limit.rlim_cur;
    self.nofile_hard = limit.rlim_max;
    struct rlimit raised = {limit.rlim_max, limit.rlim_max};
    self.raised_nofile = limit.rlim_cur < limit.rlim_max && setrlimit(RLIMIT_NOFILE, &raised) == 0;
    rlim_t have = self.raised_nofile ? limit.rlim_max : limit.rlim_cur;
    rlim_t fit = have > DESCRIPTORS_SPARE ? (have - DESCRIPTORS_SPARE) / DESCRIPTORS_EACH : 1;
    self.max_commands = fit < SLOTS / 2 ? (int)fit : (int)SLOTS / 2;
}

static void open_signals(void) {
    static const uint64_t normal[8]; /* the kernel's sigaction: SIG_DFL, no flags, no mask */
    sigset_t set;
    sigfillset(&set);
    sigprocmask(SIG_SETMASK, &set, NULL); /* supervisors inherit this */
    for (int s = 1; s <= 64; s++) /* sigaction() refuses those that libc keeps for itself */
        syscall(SYS_rt_sigaction, s, normal, NULL, 8); /* what we were told to ignore no program shall */
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&set);
    for (const int *s = (const int[]){SIGCHLD, SIGTERM, SIGINT, SIGQUIT, 0}; *s; s++)
        sigaddset(&set, *s);
    signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void set_up(void) {
    close_from(3);
    self.null = open("/dev/null", O_RDWR | O_CLOEXEC);
    bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    poller = epoll_create1(EPOLL_CLOEXEC);
    slots = mmap(NULL, SLOTS * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    open_signals();
    tree_open();
    if (self.null < 0 || bell < 0 || poller < 0 || signals < 0 || slots == MAP_FAILED)
        fail("agent: cannot set up: needs /dev/null, eventfd, epoll, signalfd and shared memory\n");
    watch(signals, EPOLLIN, TAG_SIGNAL, true);
    watch(bell, EPOLLIN, TAG_BELL, true);
}

static long number(const char *text, long most) {
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || value < 1 || value > most)
        fail("agent: an option needs a whole number from 1, and none that large\n");
    return value;
}

/* How many processes each user of this user namespace may have. Set here, not by what makes the container:
 * a limit that is there when the namespace is made counts the processes of all sandboxes together. */
static void bound_tasks(rlim_t most) {
    struct rlimit limit = {most, most};
    if (setrlimit(RLIMIT_NPROC, &limit) != 0)
        fail("agent: cannot lower the number of processes\n");
}

int main(int argc, char **argv, char **environment) {
    long orphan_s = 60, memory_mb = 32;
    int at = 1;
    for (; at + 1 < argc && strncmp(argv[at], "--", 2) == 0; at += 2) {
        if (strcmp(argv[at], "--orphan-timeout") == 0)
            orphan_s = number(argv[at + 1], 86400);
        else if (strcmp(argv[at], "--memory-mb") == 0)
            memory_mb = number(argv[at + 1], 86400);
        else if (strcmp(argv[at], "--tasks") == 0)
            bound_tasks((rlim_t)number(argv[at + 1], 4194304));
        else if (strcmp(argv[at], "--workdir") == 0)
            make_directory(argv[at + 1]); /* here it is a system call or two; a container engine mounts for it */
        else
            fail("agent: unknown option; allowed: --orphan-timeout S, --memory-mb MB, --tasks N, --workdir DIR\n");
    }
    if (at + 1 != argc || strlen(argv[at]) >= sizeof((struct sockaddr_un *)0)->sun_path)
        fail("usage: agent [--orphan-timeout SECONDS] [--memory-mb MB] [--tasks N] [--workdir DIR] SOCKET (107 bytes)\n");
    if (getpid() != 1)
        fail("agent: must be PID 1 of a pid namespace: it kills everything it can see when it ends\n");
    protect();
    confine();
    self.environment = environment;
    self.memory_left = self.memory_most = (int64_t)memory_mb << 20;
    count_descriptors();
    set_up();
    wire_open(argv[at], (int64_t)orphan_s * 1000000);
    for (;;)
        turn();
}
