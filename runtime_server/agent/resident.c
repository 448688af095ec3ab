/* Supervisors that stay: with no descendants left, they take the next command.
 *
 * Its frame and its pipes come through their door, a socket. That saves a fork, an exit and a reaping of each
 * command. What keeps descendants is busy; what is killed, by us or in the sandbox, is replaced.
 */
#include "agent.h"

#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define RESIDENTS 4         /* busy or not */
#define FRAME_THROUGH 16384 /* bytes of a command that goes through a door */

/* What comes through a door: the slot's number and the frame, with three descriptors. */
struct passed {
    uint32_t slot;
    unsigned char frame[FRAME_THROUGH];
};
union rights {
    struct cmsghdr header;
    char room[CMSG_SPACE(3 * sizeof(int))];
};

static struct resident {
    pid_t pid; /* 0: none */
    int door;
    bool busy, dying;
} residents[RESIDENTS];

static bool may_stay(const struct program *program) {
    return program->frame && program->frame_size <= FRAME_THROUGH;
}

static struct resident *resident_of(pid_t pid) {
    for (struct resident *r = residents; pid > 0 && r < residents + RESIDENTS; r++)
        if (r->pid == pid)
            return r;
    return NULL;
}

void resident_free(pid_t supervisor) {
    struct resident *r = resident_of(supervisor);
    if (r)
        r->busy = false;
}

/* What it is given after this would be lost. */
void resident_end(pid_t supervisor) {
    struct resident *r = resident_of(supervisor);
    if (r)
        r->dying = true;
    kill(supervisor, SIGKILL);
}

void resident_end_all(void) {
    for (struct resident *r = residents; r < residents + RESIDENTS; r++)
        r->dying = true;
    kill(-1, SIGKILL);
}

void resident_gone(pid_t supervisor) {
    struct resident *r = resident_of(supervisor);
    if (r) {
        close(r->door);
        r->pid = 0;
    }
}

bool resident_idle(pid_t process) {
    const struct resident *r = resident_of(process);
    return r && !r->busy;
}

static bool pass(const struct resident *r, const struct slot *slot, const struct program *program) {
    uint32_t number = (uint32_t)(slot - slots);
    int fds[3] = {program->in, program->out, program->err};
    union rights rights;
    struct iovec parts[] = {{&number, sizeof number}, {(void *)(uintptr_t)program->frame, program->frame_size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2, .msg_control = &rights};
    message.msg_controllen = sizeof rights;
    memset(&rights, 0, sizeof rights);
    rights.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    rights.header.cmsg_len = CMSG_LEN(sizeof fds);
    memcpy(CMSG_DATA(&rights.header), fds, sizeof fds);
    return sendmsg(r->door, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

/* One that is idle, or 0. Somebody in the sandbox may have stopped it, or killed it: then it takes nothing. */
pid_t resident_take(const struct slot *slot, const struct program *program) {
    for (struct resident *r = residents; may_stay(program) && r < residents + RESIDENTS; r++)
        if (r->pid && !r->busy && !r->dying) {
            kill(r->pid, SIGCONT);
            if (pass(r, slot, program)) {
                r->busy = true;
                return r->pid;
            }
            resident_end(r->pid);
        }
    return 0;
}

/* The other end of a door for one more, -1 where there is none to be had; `resident_made` tells whose it is. */
static struct resident *becoming;

int resident_door(const struct program *program) {
    int ends[2];
    becoming = NULL;
    for (struct resident *r = residents; may_stay(program) && r < residents + RESIDENTS; r++)
        if (!r->pid && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0) {
            *r = (struct resident){.door = ends[0], .busy = true};
            becoming = r;
            return ends[1];
        }
    return -1;
}

void resident_made(int door, pid_t pid) {
    if (!becoming)
        return;
    close(door);
    if (pid < 0)
        close(becoming->door);
    else
        becoming->pid = pid;
}

/* ---- in the supervisor ------------------------------------------------------------------------------ */

/* The lowest free descriptors are 0, 1 and 2, so that is where the kernel puts those of the command. */
bool resident_hear(struct slot **slot, const unsigned char **frame, size_t *size) {
    static struct passed passed;
    union rights rights;
    struct iovec bytes = {&passed, sizeof passed};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &rights};
    message.msg_controllen = sizeof rights;
    ssize_t got = recvmsg(DOOR, &message, 0);
    const struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (!header || (size_t)got < sizeof passed.slot || header->cmsg_len != CMSG_LEN(3 * sizeof(int)))
        return false;
    *size = (size_t)got - sizeof passed.slot;
    *slot = &slots[passed.slot];
    *frame = passed.frame;
    int fds[3];
    memcpy(fds, CMSG_DATA(header), sizeof fds);
    return fds[0] == 0 && fds[1] == 1 && fds[2] == 2;
}
