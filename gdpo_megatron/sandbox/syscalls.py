"""The system calls a program under test may make: a table, by what they are needed for.

Everything else fails with EPERM: fork, exec, sockets, ptrace, signals to others, io_uring, mounts,
namespaces, chmod, writing to the file system, prctl. Numbers are those of x86-64 (linux/unistd.h).
"""

from __future__ import annotations

import errno
import os

from gdpo_megatron.sandbox.bpf import Argument, Rule, assemble, errno_action

# Stands in the filter for the pid of the process that installs it.
OWN_PID = 0x7FFFFFF0

_FREE = {
    "open descriptors": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "pread64": 17,
        "pwrite64": 18, "readv": 19, "writev": 20, "pipe": 22, "select": 23, "dup": 32,
        "dup2": 33, "epoll_wait": 232, "epoll_ctl": 233, "pselect6": 270, "ppoll": 271,
        "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
    },
    # Landlock says which files; there are none to write.
    "files": {
        "open": 2, "stat": 4, "lstat": 6, "access": 21, "getcwd": 79, "readlink": 89,
        "getdents64": 217, "openat": 257, "newfstatat": 262, "readlinkat": 267,
        "faccessat": 269, "statx": 332, "faccessat2": 439,
    },
    "memory": {
        "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "madvise": 28,
    },
    "threads": {
        "sched_yield": 24, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
        "set_tid_address": 218, "set_robust_list": 273, "getcpu": 309, "membarrier": 324,
        "rseq": 334,
    },
    "time": {
        "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "gettimeofday": 96,
        "times": 100, "time": 201, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230,
    },
    "about itself": {
        "getpid": 39, "uname": 63, "getrlimit": 97, "getrusage": 98, "sysinfo": 99,
        "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
        "getpgrp": 111, "getgroups": 115, "getrandom": 318,
    },
    "own signals": {
        "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pause": 34,
        "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131,
        "restart_syscall": 219,
    },
    "end": {"exit": 60, "exit_group": 231},
}  # fmt: skip

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000  # mount, cgroup, uts, ipc, user, pid, net
# isatty, window size, bytes waiting, close-on-exec: no terminal is stuffed, no owner set.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Not F_SETOWN with
# F_SETSIG: the kernel would send any signal to any process of this user.
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)

_CONDITIONAL = (
    Rule(16, (Argument(1, _IOCTLS),)),  # ioctl
    Rule(72, (Argument(1, _FCNTLS),)),  # fcntl
    # clone: threads, no processes
    Rule(56, (Argument(0, (_CLONE_THREAD,), mask=_CLONE_THREAD | _CLONE_NAMESPACES),)),
    # clone3 keeps its flags behind a pointer; libc falls back to clone where it does not exist.
    Rule(435, action=errno_action(errno.ENOSYS)),
    Rule(62, (Argument(0, (OWN_PID,)),)),  # kill
    Rule(234, (Argument(0, (OWN_PID,)),)),  # tgkill
    Rule(302, (Argument(0, (0,)), Argument(2, (0,), wide=True))),  # prlimit64: read its own
)


def program_filter() -> bytes:
    """The filter of a program under test; `OWN_PID` in it is still to be replaced."""
    free = [Rule(number) for group in _FREE.values() for number in group.values()]
    return assemble([*free, *_CONDITIONAL], errno_action(errno.EPERM))


def supported() -> bool:
    """Whether this machine has the numbers of this table."""
    return os.uname().sysname == "Linux" and os.uname().machine == "x86_64"
