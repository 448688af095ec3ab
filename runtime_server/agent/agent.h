/* The sandbox agent: PID 1 of a container, one connection to the server, many commands at once.
 *
 * agent.c    start-up, the event loop, signals, reaping, the orphan clock
 * wire.c     the connection: frames in and out, fixed buffers, back-pressure
 * keep.c     the head and tail of a stream that are kept
 * command.c  one command: stdin window, its life from start to last frame
 * output.c   its output pipes, and when they are read
 * report.c   what the server is told, and the commands' clock
 * held.c     results that are kept until the server says so, and how it picks up commands again
 * jobs.c     starting a command or a file job from its frame
 * launch.c   the processes: supervisor, program, and what a program inherits
 * resident.c supervisors that stay for the next command
 * session.c  a shell that stays, and the commands it is given
 * pty.c      terminals
 * tree.c     killing or signalling everything that descends from a command
 * confine.c  the system calls that nothing in the sandbox may make
 * files.c    reading and writing files, in a child of their own
 * tarout.c   a tar of a directory, likewise;  tarin.c   and back, confined
 *
 * The protocol is described in frames.py, its other end.
 */
#ifndef AGENT_H
#define AGENT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PROTOCOL 2u
#define FRAME_MAX (1u << 20)   /* bytes of a frame after its length word */
#define HEADER 9u              /* length, kind, id */
#define CHUNK (32u * 1024u)    /* bytes of one data frame that we send */
#define WINDOW (128u * 1024u)  /* stdin bytes the server may have in flight for one command */
#define REPLY_ROOM 4096u       /* free space in the out buffer that every received frame may count on */
#define SLOTS 1024u            /* commands running, or finished with background processes left */
#define PUSH_WINDOW (256u * 1024u) /* bytes of streams, and of one archive, that the server has not taken */
#define TAG_MAX 64u            /* bytes of the name the server gives a command, to know it again */
#define HELD_MOST 64           /* results kept for a server that may ask (again) */
#define GRACE_MS 20            /* after the program ended, for what its last children still write */
#define STRINGS_MAX 32768u     /* arguments, and environment entries, of one command */

enum kind {
    F_WELCOME = 1, F_EXEC, F_DATA, F_CANCEL, F_WRITE, F_READ, F_PING, F_KILL_ALL,
    F_OPEN, F_RUN, F_SIGNAL, F_RESIZE, F_ATTACH, F_RELEASE, F_PACK, F_UNPACK, F_ACK,
    F_HELLO = 65, F_CREDIT, F_OUTPUT, F_FINISHED, F_CONTENT, F_DONE, F_FAILED, F_PONG,
    F_CHUNK, F_STARTED,
};

enum { TIMED_OUT = 1, KILLED = 2, ENDED = 4 }; /* flags of F_FINISHED; ENDED: the session's shell did */
enum { WITH_STDIN = 1, PUSH = 2, WITH_PTY = 4 }; /* flags of F_EXEC, F_OPEN, F_RUN */
enum { STDIN_CLOSED = 0xffffffffu };         /* credit that means: send no more */

enum job { J_NONE, J_EXEC, J_WRITE, J_READ, J_SHELL, J_RUN };
enum state { S_RUNNING, S_GRACE, S_KILLING, S_SENDING, S_HELD, S_LINGER };
enum phase { P_FREEZE, P_KILL };

/* Written by a child of ours, read by us: shared memory, so that no report can be lost or forged. Our
 * children keep it only until they exec; before that nobody can trace them (they are not dumpable). */
struct slot {
    _Atomic int done;
    int status;       /* wait status of the program */
    int error;        /* errno of what failed before it started, or of a file job */
    const char *what; /* what failed; a literal, so the same address on both sides of fork */
    uint64_t value;   /* bytes of a file job */
    _Atomic int root; /* pid of the program, once it runs */
    _Atomic int alone; /* the supervisor has no descendant left, and takes another command */
};

/* The first and the last bytes of a stream: data[0..head) stays, data[head..cap) is a ring once full. */
struct keep {
    unsigned char *data;
    size_t size, cap, head;
    uint64_t total;
};

struct command {
    enum job job;
    enum state state;
    enum phase phase;
    uint32_t id;
    pid_t pid;                 /* supervisor or file helper; 0 once reaped */
    int in, out[2];            /* our ends of the pipes; -1 when closed */
    bool detached;             /* its connection is gone: nobody waits for the result */
    bool paused;               /* J_READ: the out buffer is full, the pipe is not being polled */
    bool stdin_eof, stdin_told, stdin_armed;
    uint8_t flags;
    unsigned char *pending;    /* stdin bytes the program has not taken, WINDOW long */
    size_t pending_from, pending_to;
    uint32_t credit;           /* stdin bytes taken, not yet told to the server */
    struct keep kept[2];
    uint64_t sent[2];
    int status;
    int64_t started_us, took_us, deadline_us, grace_us;
    int64_t kill_us, phase_us; /* when the killing, and its present phase, began */
    int64_t watch_us;          /* when its output begins to be watched; 0: it is */
    unsigned live, moving, clean;
    char tag[TAG_MAX + 1];
    bool push;                 /* output is sent as it comes */
    bool announce;             /* the server waits to hear that it has started */
    bool windowed;             /* J_READ: `window` says how much may be sent */
    uint32_t window;
    int master;                /* of a terminal; -1 */
    struct command *peer;      /* J_RUN: its session; J_SHELL: what it runs, or NULL */
    struct shell *shell;       /* J_SHELL */
    uint64_t born_tick;        /* J_RUN: a process that started earlier is none of its own */
    pid_t born_pid;
    uint64_t told_tick;        /* J_RUN: when it was interrupted */
    uint32_t sequence, parent; /* J_RUN: its own number, its session's id */
};

struct self {
    char **environment;
    int max_commands;
    int64_t memory_left;       /* bytes that kept output may still take, of memory_most */
    int64_t memory_most;
    bool raised_nofile;
    const char *oom;           /* oom_score_adj of programs, NULL: as ours */
    int null;                  /* /dev/null as it was before any sandbox code ran */
    uint64_t nofile_soft, nofile_hard;
    int nice;
};

extern struct self self;
extern struct command commands[SLOTS];
extern struct slot *slots;
extern unsigned used;          /* commands[used..] are free */
extern int bell;               /* eventfd a supervisor rings when its program ended; above it all is closed */

/* agent.c */
int64_t now_us(void);
void watch(int fd, uint32_t events, uint64_t tag, bool add);
void forget(int fd);
_Noreturn void end_everything(void);
uint32_t get32(const unsigned char *at);
uint64_t get64(const unsigned char *at);
unsigned char *put32(unsigned char *at, uint32_t value);
unsigned char *put64(unsigned char *at, uint64_t value);

/* confine.c */
void confine(void);

/* wire.c */
#define TAG_SOCKET (UINT64_MAX)
#define TAG_SIGNAL (UINT64_MAX - 1)
#define TAG_BELL (UINT64_MAX - 2)
void wire_open(const char *path, int64_t orphan_us);
void wire_event(uint32_t events);
void wire_flush(void);
int64_t wire_tick(int64_t now);
size_t wire_room(void);
unsigned char *wire_begin(size_t room);
void wire_commit(enum kind kind, uint32_t id, size_t size);
void wire_send(enum kind kind, uint32_t id, const void *payload, size_t size);
void wire_fail(uint32_t id, int error, const char *what);
extern uint32_t push_left;     /* of PUSH_WINDOW */

/* report.c */
int64_t command_tick(int64_t now);
bool command_pump(void);

/* command.c */
bool command_frame(enum kind kind, uint32_t id, const unsigned char *payload, size_t size);
void command_event(unsigned index, unsigned stream, uint32_t events);
void command_reaped(pid_t pid, int status);
void command_bell(void);
void command_detach_all(void);
void command_settle(struct command *c);
void command_doom(struct command *c, uint8_t flags);
void command_kill_all(uint32_t id);
void command_no_children(void);
struct command *command_find(uint32_t id);
struct command *command_new(enum job job, uint32_t id);
void command_free(struct command *c);
struct slot *command_slot(const struct command *c);
void command_watch(struct command *c, unsigned stream, uint32_t events, bool add);
void command_close(int *fd);
bool command_alone(const struct command *c);
void command_close_stdin(struct command *c);
bool command_killing_all(void);
static inline bool command_has_tree(const struct command *c) {
    return c->job == J_EXEC || c->job == J_SHELL; /* a supervisor, and whatever descends from it */
}
static inline bool command_is_dying(const struct command *c) {
    return c->state == S_KILLING && (command_has_tree(c) || c->job == J_RUN);
}

/* output.c */
void output_watch(struct command *c);
void output_close(struct command *c, unsigned which);
void output_drain(struct command *c);
void output_stream(struct command *c);
void output_collect(struct command *c, unsigned which);

/* held.c */
void command_hold(struct command *c);
bool command_attach(struct command *c);
void command_release(struct command *c);
unsigned char *command_list(unsigned char *at);
#define LISTED_MOST (12 + TAG_MAX)

/* keep.c */
void keep_add(struct keep *k, const unsigned char *bytes, size_t count);
size_t keep_count(const struct keep *k);
size_t keep_copy(const struct keep *k, uint64_t from, unsigned char *to, size_t count);
void keep_free(struct keep *k);
uint64_t keep_next(const struct keep *k, uint64_t offset);
size_t keep_copy_at(const struct keep *k, uint64_t offset, unsigned char *to, size_t count);
void keep_move(struct keep *to, struct keep *from);

/* jobs.c */
void exec_frame(uint32_t id, const unsigned char *payload, size_t size);
void write_frame(uint32_t id, const unsigned char *payload, size_t size);
void read_frame(uint32_t id, const unsigned char *payload, size_t size);
void pack_frame(uint32_t id, const unsigned char *payload, size_t size);
void unpack_frame(uint32_t id, const unsigned char *payload, size_t size);
struct reader {
    const unsigned char *at, *end;
    bool good;
};
const unsigned char *take_bytes(struct reader *r, size_t count);
char *take_string(struct reader *r);
struct request {
    uint32_t flags, timeout_ms, max_output;
    unsigned columns, rows;
    char *cwd, *tag, **argv, **given, **env;
    size_t argc, envc;
};
bool read_request(struct request *q, const unsigned char *payload, size_t size);
void free_request(struct request *q);
struct command *prepare(enum job job, uint32_t id, bool in, bool out, bool err, int theirs[3]);
void started(struct command *c, pid_t pid, const int theirs[3]);
bool open_pipe(int *ours, int *theirs, bool we_read);
void close_theirs(const int *fds, size_t count);

/* pty.c */
bool pty_open(int *master, int *slave, unsigned columns, unsigned rows);
void pty_plain(int slave);
void pty_resize(int master, unsigned columns, unsigned rows);

/* session.c */
void open_frame(uint32_t id, const unsigned char *payload, size_t size);
void run_frame(uint32_t id, const unsigned char *payload, size_t size);
void session_status(struct command *c);
void session_ended(struct command *c);
void session_leave(struct command *run);
void session_free(struct command *c);
void session_interrupt(struct command *run, uint32_t grace_ms);
void session_abort(struct command *run);
int64_t session_tick(struct command *run, int64_t now);

/* launch.c */
#define HANDED_FIRST 240 /* where a shell finds what we hand it: above what scripts use, below 256 */
#define HANDED 6
#define MOVED_TO 300
struct program {
    const char *cwd;
    char **argv, **env;
    int in, out, err;
    bool announce, tty;        /* tell when it runs; its terminal is on `in`, or handed[1] */
    bool shell;                /* argv is a list of shells to try */
    const unsigned char *frame; /* what it was asked for with, if a supervisor that stays may have it */
    size_t frame_size;
    int handed[HANDED];
};
pid_t launch(struct slot *slot, const struct program *program);
pid_t launch_helper(int in, int out);
void close_from(int first);

/* resident.c */
#define DOOR (bell + 1) /* a supervisor's end of it */
pid_t resident_take(const struct slot *slot, const struct program *program);
int resident_door(const struct program *program);
void resident_made(int door, pid_t pid);
bool resident_hear(struct slot **slot, const unsigned char **frame, size_t *size);
void resident_free(pid_t supervisor); /* it is alone */
void resident_end(pid_t supervisor);
void resident_end_all(void);           /* and everybody else in the sandbox */
void resident_gone(pid_t supervisor);  /* it was reaped */
bool resident_idle(pid_t process);     /* a supervisor without a command */

/* files.c */
void make_directory(char *path);
_Noreturn void file_write(struct slot *slot, const char *path, mode_t mode, bool parents, uint64_t size);
_Noreturn void file_read(struct slot *slot, const char *path, uint64_t limit);
_Noreturn void file_end(struct slot *slot, int error, const char *what, uint64_t value);
bool put_all(int fd, const void *bytes, size_t count);

/* tarout.c, tarin.c */
_Noreturn void tar_out(struct slot *slot, const char *path, uint64_t limit);
_Noreturn void tar_in(struct slot *slot, char *path, uint64_t limit, uint64_t entries);

/* tree.c */
void tree_open(void);
void tree_tick(int64_t now);
void tree_release(void);
void tree_signal(struct command *c, int signal, uint64_t since);
uint64_t tree_now(void);
int tree_reopen(int fd, int flags);
pid_t tree_last_pid(void);

#endif
