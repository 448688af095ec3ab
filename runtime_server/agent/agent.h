/* The sandbox agent: PID 1 of a container, one connection to the server, many commands at once.
 *
 * agent.c    start-up, the event loop, signals, reaping, the orphan clock
 * wire.c     the connection: frames in and out, fixed buffers, back-pressure
 * keep.c     the head and tail of a stream that are kept
 * command.c  one command: pipes, stdin window, kept output, its life from start to last frame
 * report.c   what the server is told, and the commands' clock
 * jobs.c     starting a command or a file job from its frame
 * launch.c   the processes: supervisor, program, and what a program inherits
 * tree.c     killing everything that descends from a command
 * files.c    reading and writing files, in a child of their own
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

#define PROTOCOL 1u
#define FRAME_MAX (1u << 20)   /* bytes of a frame after its length word */
#define HEADER 9u              /* length, kind, id */
#define CHUNK (32u * 1024u)    /* bytes of one data frame that we send */
#define WINDOW (128u * 1024u)  /* stdin bytes the server may have in flight for one command */
#define REPLY_ROOM 4096u       /* free space in the out buffer that every received frame may count on */
#define SLOTS 1024u            /* commands running, or finished with background processes left */
#define GRACE_MS 20            /* after the program ended, for what its last children still write */
#define STRINGS_MAX 32768u     /* arguments, and environment entries, of one command */

enum kind {
    F_WELCOME = 1, F_EXEC, F_DATA, F_CANCEL, F_WRITE, F_READ, F_PING, F_KILL_ALL,
    F_HELLO = 65, F_CREDIT, F_OUTPUT, F_FINISHED, F_CONTENT, F_DONE, F_FAILED, F_PONG,
};

enum { TIMED_OUT = 1, KILLED = 2 };          /* flags of F_FINISHED */
enum { STDIN_CLOSED = 0xffffffffu };         /* credit that means: send no more */

enum job { J_NONE, J_EXEC, J_WRITE, J_READ };
enum state { S_RUNNING, S_GRACE, S_KILLING, S_SENDING, S_LINGER };
enum phase { P_FREEZE, P_KILL };

/* Written by a child of ours, read by us: shared memory, so that no report can be lost or forged. Our
 * children keep it only until they exec; before that nobody can trace them (they are not dumpable). */
struct slot {
    _Atomic int done;
    int status;       /* wait status of the program */
    int error;        /* errno of what failed before it started, or of a file job */
    const char *what; /* what failed; a literal, so the same address on both sides of fork */
    uint64_t value;   /* bytes of a file job */
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
    unsigned live, moving, clean;
};

struct self {
    char **environment;
    int max_commands;
    int64_t memory_left;       /* bytes that kept output may still take */
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

/* keep.c */
void keep_add(struct keep *k, const unsigned char *bytes, size_t count);
size_t keep_count(const struct keep *k);
size_t keep_copy(const struct keep *k, uint64_t from, unsigned char *to, size_t count);
void keep_free(struct keep *k);

/* jobs.c */
void exec_frame(uint32_t id, const unsigned char *payload, size_t size);
void write_frame(uint32_t id, const unsigned char *payload, size_t size);
void read_frame(uint32_t id, const unsigned char *payload, size_t size);

/* launch.c */
struct program {
    const char *cwd;
    char **argv, **env;
    int in, out, err;
};
pid_t launch(struct slot *slot, const struct program *program);
pid_t launch_helper(int in, int out);
void close_from(int first);

/* files.c */
void make_directory(char *path);
_Noreturn void file_write(struct slot *slot, const char *path, mode_t mode, bool parents, uint64_t size);
_Noreturn void file_read(struct slot *slot, const char *path, uint64_t limit);

/* tree.c */
void tree_open(void);
void tree_tick(int64_t now);

#endif
