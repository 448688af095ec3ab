/* The agent's own filter of system calls, for itself and everything that it starts.
 *
 * It comes on top of the container engine's, and does not depend on it: engines allow what the features
 * they are made for need (mounts and namespaces for containers in containers, keyrings), and some have no
 * filter at all. Refused is what no program of a sandbox needs and what widens the kernel it can reach:
 * new namespaces, mounts, keyrings (one is shared by all processes of a user, whatever their container),
 * bpf, perf, userfaultfd, io_uring, modules, clocks, kinds of sockets that no network namespace holds back
 * (vsock reaches the machine's host), typing into terminals, and the system calls of other machine types.
 *
 * What a program can do without gets ENOSYS, so that it falls back (clone3, io_uring); the rest gets EPERM.
 * It cannot be taken off again. A kernel that has no filters goes on without: the server looks and says so.
 */
#include "agent.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define NATIVE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE AUDIT_ARCH_AARCH64
#else
#error "no list of system calls for this machine type"
#endif

#ifndef SECCOMP_RET_KILL_PROCESS
#define SECCOMP_RET_KILL_PROCESS 0x80000000u
#endif
#ifndef SECCOMP_FILTER_FLAG_SPEC_ALLOW
#define SECCOMP_FILTER_FLAG_SPEC_ALLOW 4u
#endif
#ifndef TIOCLINUX
#define TIOCLINUX 0x541C
#endif
#define X32 0x40000000u
#define NAMESPACES 0x7e020080u /* every CLONE_NEW*, time included */

/* Numbers that are the same on every machine type; libc's headers may be older than the kernel. */
enum {
    IO_URING_FIRST = 425, IO_URING_LAST = 427, OPEN_TREE = 428, MOUNT_API_LAST = 433, CLONE3 = 435,
    MOUNT_SETATTR = 442, QUOTACTL_FD = 443,
};

static const uint32_t refused[] = {
    SYS_add_key, SYS_request_key, SYS_keyctl, SYS_bpf, SYS_perf_event_open, SYS_userfaultfd,
    SYS_mount, SYS_umount2, SYS_pivot_root, MOUNT_SETATTR, SYS_setns, SYS_swapon, SYS_swapoff,
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_kexec_file_load, SYS_reboot,
    SYS_settimeofday, SYS_clock_settime, SYS_acct, SYS_quotactl, QUOTACTL_FD, SYS_syslog,
    SYS_open_by_handle_at, SYS_name_to_handle_at, SYS_vhangup, SYS_sethostname, SYS_setdomainname,
#ifdef __x86_64__
    SYS_iopl, SYS_ioperm, SYS_modify_ldt, SYS_uselib,
#endif
};
static const uint32_t families[] = {AF_UNSPEC, AF_UNIX, AF_INET, AF_INET6, AF_NETLINK};

#define COUNT(list) (sizeof(list) / sizeof *(list))
#define LOW(n) ((uint32_t)(offsetof(struct seccomp_data, args) + 8 * (n))) /* both machine types: low half first */
#define LOAD(where) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (where))
#define IF(what, value, yes, no) BPF_JUMP(BPF_JMP | what | BPF_K, (value), (yes), (no))
#define ANSWER(value) BPF_STMT(BPF_RET | BPF_K, (value))
#define ERROR(number) (SECCOMP_RET_ERRNO | (number))

static struct sock_filter filter[128];
static unsigned short length;

static void add(struct sock_filter line) {
    filter[length++] = line;
}

/* If the number of the call is this one, then the answer. */
static void refuse(uint32_t number, uint32_t answer) {
    add((struct sock_filter)IF(BPF_JEQ, number, 0, 1));
    add((struct sock_filter)ANSWER(answer));
}

static void refuse_range(uint32_t first, uint32_t last, uint32_t answer) {
    add((struct sock_filter)IF(BPF_JGE, first, 0, 2));
    add((struct sock_filter)IF(BPF_JGT, last, 1, 0));
    add((struct sock_filter)ANSWER(answer));
}

static void foreign(void) {
    add((struct sock_filter)LOAD(offsetof(struct seccomp_data, arch)));
    add((struct sock_filter)IF(BPF_JEQ, NATIVE, 1, 0));
    add((struct sock_filter)ANSWER(SECCOMP_RET_KILL_PROCESS));
    add((struct sock_filter)LOAD(offsetof(struct seccomp_data, nr)));
#ifdef __x86_64__
    refuse_range(X32, ~0u, ERROR(ENOSYS));
#endif
}

/* A call with flags for new namespaces in its first argument. */
static void namespaces(uint32_t number) {
    add((struct sock_filter)IF(BPF_JEQ, number, 0, 4));
    add((struct sock_filter)LOAD(LOW(0)));
    add((struct sock_filter)IF(BPF_JSET, NAMESPACES, 0, 1));
    add((struct sock_filter)ANSWER(ERROR(EPERM)));
    add((struct sock_filter)ANSWER(SECCOMP_RET_ALLOW));
}

static void sockets(uint32_t number) {
    add((struct sock_filter)IF(BPF_JEQ, number, 0, (unsigned char)(COUNT(families) + 3)));
    add((struct sock_filter)LOAD(LOW(0)));
    for (unsigned i = 0; i < COUNT(families); i++)
        add((struct sock_filter)IF(BPF_JEQ, families[i], (unsigned char)(COUNT(families) - i), 0));
    add((struct sock_filter)ANSWER(ERROR(EAFNOSUPPORT)));
    add((struct sock_filter)ANSWER(SECCOMP_RET_ALLOW));
}

static void terminals(void) {
    add((struct sock_filter)IF(BPF_JEQ, SYS_ioctl, 0, 4));
    add((struct sock_filter)LOAD(LOW(1)));
    add((struct sock_filter)IF(BPF_JEQ, TIOCSTI, 1, 0));
    add((struct sock_filter)IF(BPF_JEQ, TIOCLINUX, 0, 1));
    add((struct sock_filter)ANSWER(ERROR(EPERM)));
}

void confine(void) {
    foreign();
    for (unsigned i = 0; i < COUNT(refused); i++)
        refuse(refused[i], ERROR(EPERM));
    refuse_range(IO_URING_FIRST, IO_URING_LAST, ERROR(ENOSYS));
    refuse_range(OPEN_TREE, MOUNT_API_LAST, ERROR(EPERM));
    refuse(CLONE3, ERROR(ENOSYS)); /* its flags are behind a pointer */
    namespaces(SYS_clone);
    namespaces(SYS_unshare);
    sockets(SYS_socket);
    sockets(SYS_socketpair);
    terminals();
    add((struct sock_filter)ANSWER(SECCOMP_RET_ALLOW));
    struct sock_fprog program = {length, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return;
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) != 0)
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
