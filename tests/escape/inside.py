"""Comes before every program that attacks from inside: raw system calls, by number, whatever libc has."""

import ctypes
import errno
import os
import platform

libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
NR = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "unshare": (272, 97), "setns": (308, 268),
    "clone": (56, 220), "clone3": (435, 435), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "ptrace": (101, 117), "process_vm_readv": (310, 270), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "userfaultfd": (323, 282),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "open_tree": (428, 428), "fsopen": (430, 430),
    "mount_setattr": (442, 442), "settimeofday": (164, 170), "clock_settime": (227, 112), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "kexec_load": (246, 104), "acct": (163, 89), "syslog": (103, 116),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "chroot": (161, 51), "sethostname": (170, 161), "quotactl": (179, 60),
}  # fmt: skip


def outcome(result):
    return "done" if result >= 0 else errno.errorcode.get(ctypes.get_errno(), "E?")


def call(name, *arguments):
    return outcome(libc.syscall(NR[name][ARM], *arguments))


def tried(work):
    """`done`, or the name of the error."""
    try:
        work()
        return "done"
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)


def write(path, text):
    def work():
        file = os.open(path, os.O_WRONLY)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)

    return tried(work)


def read(path):
    return tried(lambda: os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 64))
