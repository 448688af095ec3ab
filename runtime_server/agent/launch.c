/* Processes: a supervisor per command, the program under it, and what a program inherits from us: nothing.
 *
 * The supervisor is a child subreaper, so every orphan of the command, however often it forked or called
 * setsid, becomes its child and stays findable. It reports the program's end through shared memory and the
 * bell, waits for what is left in the background, and exits when it has no children. All signals are
 * blocked in it; only SIGKILL and SIGSTOP from inside the sandbox reach it, and tree.c copes with both.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

void close_from(int first) {
    if (syscall(SYS_close_range, (unsigned)first, ~0u, 0) == 0)
        return;
    struct rlimit limit; /* Linux before 5.9 */
    rlim_t last = getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 65536 ? limit.rlim_cur : 65536;
    for (int fd = first; fd < (int)last; fd++)
        close(fd);
}

/* The agent itself ignores nothing else, nor did it when it began (agent.c); an exec undoes handlers. */
static void reset_signals(void) {
    signal(SIGPIPE, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static void set_oom(void) {
    static const char path[] = "/proc/self/oom_score_adj";
    int fd = openat(AT_FDCWD, path, O_WRONLY | O_CLOEXEC); /* musl's open() asks twice for the flag */
    if (fd < 0 && errno == EACCES && prctl(PR_SET_DUMPABLE, 1) == 0)
        fd = openat(AT_FDCWD, path, O_WRONLY | O_CLOEXEC); /* the file belongs to root while we are not dumpable */
    if (fd >= 0 && write(fd, self.oom, strlen(self.oom)) > 0)
        close(fd);
}

static void close_between(int first, int last) {
    if (syscall(SYS_close_range, (unsigned)first, (unsigned)last, 0) != 0)
        for (int fd = first; fd <= last; fd++)
            close(fd);
}

/* What protects the agent ends here: when memory runs out a program dies, not the agent. */
static void become_ordinary(const struct program *program) {
    setsid();
    reset_signals();
    if (program->shell)
        close_between(3, HANDED_FIRST - 1);
    close_from(program->shell ? HANDED_FIRST + HANDED : 3);
    if (program->tty)
        ioctl(program->shell ? HANDED_FIRST + 1 : 0, TIOCSCTTY, 0);
    if (self.oom)
        set_oom();
    if (self.nice)
        setpriority(PRIO_PROCESS, 0, 0);
    if (self.raised_nofile) {
        struct rlimit limit = {self.nofile_soft, self.nofile_hard};
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void say(const char *verb, const char *name, int error) {
    const char *parts[] = {"sandbox agent: cannot ", verb, name, ": ", strerror(error), "\n"};
    struct iovec text[6];
    for (int i = 0; i < 6; i++)
        text[i] = (struct iovec){(void *)(uintptr_t)parts[i], strlen(parts[i])};
    if (writev(2, text, 6) < 0)
        _exit(126);
}

static const char *lookup(char **env, const char *name, const char *otherwise) {
    size_t length = strlen(name);
    for (; *env; env++)
        if (strncmp(*env, name, length) == 0 && (*env)[length] == '=')
            return *env + length + 1;
    return otherwise;
}

/* Runs `path`; what has neither a shebang nor a known format is a shell script, as every shell has it. */
static int try(const char *path, char **argv, char **env) {
    execve(path, argv, env);
    if (errno != ENOEXEC)
        return errno;
    size_t count = 0;
    while (argv[count])
        count++;
    char *script[count + 2];
    script[0] = (char *)(uintptr_t)"sh";
    script[1] = (char *)(uintptr_t)path;
    memcpy(script + 2, argv + 1, count * sizeof *argv);
    execve("/bin/sh", script, env);
    return ENOEXEC;
}

/* Only returns, with an errno, when no directory of PATH has a program of that name that starts. */
static int search(char **argv, char **env) {
    if (strchr(argv[0], '/'))
        return try(argv[0], argv, env);
    int error = ENOENT;
    size_t name = strlen(argv[0]);
    const char *path = lookup(env, "PATH", DEFAULT_PATH);
    for (const char *end; name; path = end + 1) {
        end = strchrnul(path, ':');
        size_t length = (size_t)(end - path);
        char full[PATH_MAX];
        if (length + name + 2 <= sizeof full) {
            memcpy(full, length ? path : ".", length ? length : 1);
            length = length ? length : 1;
            full[length] = '/';
            memcpy(full + length + 1, argv[0], name + 1);
            int failed = try(full, argv, env);
            if (failed != ENOENT && failed != ENOTDIR)
                error = failed;
        }
        if (!*end)
            break;
    }
    return error;
}

static const char no_shell[] = "there is no such shell in this image (default: bash, else sh): run programs by argv";

static _Noreturn void run(struct slot *slot, const struct program *program) {
    static char *rest[][5] = {{"bash", "--norc", "--noprofile", "--noediting", "-i"}, {"sh", "-i"}};
    become_ordinary(program);
    int error = 0;
    char **argv = program->argv;
    if (!program->shell) {
        error = search(argv, program->env);
    } else {
        for (; *argv; argv++) {
            const char *name = strrchr(*argv, '/') ? strrchr(*argv, '/') + 1 : *argv;
            bool bash = strcmp(name, "bash") == 0;
            char *line[6] = {*argv};
            for (int i = 1; i < 5; i++)
                line[i] = rest[!bash][i];
            error = search(line, program->env);
        }
        slot->error = error;
        slot->what = no_shell;
        _exit(127);
    }
    say("run ", program->argv[0], error);
    _exit(error == ENOENT || error == ENOTDIR ? 127 : 126);
}

/* Above everything first: where they are may be where they go. */
static bool hand(const struct program *program) {
    int high[HANDED];
    for (int i = 0; i < HANDED; i++)
        high[i] = program->handed[i] < 0 ? -1 : fcntl(program->handed[i], F_DUPFD, MOVED_TO);
    for (int i = 0; i < HANDED; i++)
        if (high[i] >= 0)
            dup2(high[i], HANDED_FIRST + i);
        else if (program->handed[i] >= 0)
            return false;
        else
            close(HANDED_FIRST + i);
    close_between(bell + 1, HANDED_FIRST - 1);
    close_from(HANDED_FIRST + HANDED);
    return true;
}

static bool take(const struct program *program, int door) {
    dup2(program->in, 0);
    dup2(program->out, 1);
    dup2(program->err, 2);
    if (program->shell)
        return hand(program);
    if (door >= 0)
        dup2(door, DOOR);
    close_from(door >= 0 ? DOOR + 1 : DOOR);
    return true;
}

static void ring(void) {
    uint64_t one = 1;
    if (write(bell, &one, sizeof one) < 0)
        _exit(1); /* our end is seen anyway */
}

static void report(struct slot *slot, int status, int error, const char *what) {
    slot->status = status;
    slot->error = error;
    slot->what = what;
    atomic_store(&slot->done, 1);
    ring();
}

/* Until nothing of the command is left. `stays`: tells when that is. */
static void await(struct slot *slot, pid_t root, bool stays) {
    for (int status;;) {
        pid_t ended = waitpid(-1, &status, 0);
        if (ended == root) {
            pid_t more = stays ? waitpid(-1, NULL, WNOHANG) : 0;
            while (more > 0)
                more = waitpid(-1, NULL, WNOHANG);
            atomic_store(&slot->alone, more < 0);
            report(slot, status, slot->error, slot->what);
            if (more < 0)
                return;
        } else if (ended < 0 && errno == ECHILD) {
            break;
        }
    }
    atomic_store(&slot->alone, stays);
    if (stays)
        ring();
}

static int home = -1; /* of a supervisor that stays: where it began, and goes to again */

/* One command, whose descriptors are 0, 1 and 2 by now. */
static void carry(struct slot *slot, const struct program *program, bool stays) {
    bool there = home < 0 || (program->cwd && *program->cwd == '/') || fchdir(home) == 0;
    if (!there || (program->cwd && chdir(program->cwd) != 0)) {
        atomic_store(&slot->alone, stays);
        report(slot, 0, errno, "cannot enter the working directory");
        close_between(0, 2);
        return;
    }
    /* vfork: the program runs in our memory until its exec. Not where it has to become traceable first. */
    pid_t root = self.oom && geteuid() != 0 ? fork() : vfork();
    if (root == 0)
        run(slot, program);
    if (root < 0) {
        say("start ", "a process (too many in this sandbox?)", errno);
        atomic_store(&slot->alone, stays);
        report(slot, 126 << 8, 0, NULL);
        close_between(0, 2);
        return;
    }
    atomic_store(&slot->root, root);
    if (program->announce)
        ring();
    close_between(0, 2); /* or nobody would ever see the end of these pipes */
    if (program->shell)
        close_from(HANDED_FIRST);
    await(slot, root, stays);
}

static void serve(void) {
    struct slot *slot;
    const unsigned char *frame;
    for (size_t size; resident_hear(&slot, &frame, &size);) {
        struct request q = {0};
        if (!read_request(&q, frame, size))
            _exit(1); /* no memory: whoever waits sees our end */
        struct program program = {.cwd = *q.cwd ? q.cwd : NULL, .argv = q.argv, .env = q.env};
        carry(slot, &program, true);
        free_request(&q);
    }
}

static _Noreturn void supervise(struct slot *slot, const struct program *program, int door) {
    bool taken = take(program, door);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_NAME, "supervisor");
    umask(022);
    if (door >= 0)
        home = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (taken)
        carry(slot, program, door >= 0);
    else
        report(slot, 0, errno, "cannot hand over descriptors");
    if (taken && door >= 0)
        serve();
    _exit(0);
}

pid_t launch(struct slot *slot, const struct program *program) {
    pid_t pid = resident_take(slot, program);
    if (pid)
        return pid;
    int door = resident_door(program);
    pid = fork();
    if (pid == 0)
        supervise(slot, program, door);
    int error = errno;
    resident_made(door, pid);
    errno = error;
    return pid;
}

/* A child for file work: in it returns 0, with the job's pipes on 0 and 1 and nothing else of ours. */
pid_t launch_helper(int in, int out) {
    pid_t pid = fork();
    if (pid)
        return pid;
    dup2(in, 0);
    dup2(out, 1);
    close_from(bell + 1);
    prctl(PR_SET_NAME, "file");
    umask(022);
    return 0;
}
