"""Makes the calling process harmless: limits, no new privileges, Landlock, then the seccomp filter.

The order matters: Landlock and the filter need no_new_privs, and the filter forbids what the other
steps use. Nothing here can be undone, and nothing is executed by exec afterwards. The Landlock rule
set is made once by the fork server; a child only puts it on. Sources: landlock(7), prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_MAX_DESCRIPTORS, _STACK_BYTES = 64, 64 << 20


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def _called(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def landlock_abi() -> int:
    """Version of the kernel's Landlock; 0 where there is none."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def make_ruleset(read_trees: list[str], read_listings: list[str]) -> int:
    """A Landlock rule set that allows reading only, as a descriptor.

    Everything that the kernel's version can handle is handled, hence denied: writing and making
    files, executing, TCP (version 4), signals and abstract sockets of other processes (6).

    Args:
        read_trees: files, and folders with all that is below.
        read_listings: folders that may be listed, and those below.
    """
    abi = landlock_abi()
    files = (1 << 13) - 1
    for version, bit in ((2, 13), (3, 14), (5, 15)):  # refer, truncate, ioctl on devices
        files |= 1 << bit if abi >= version else 0
    fields = [files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0]
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("=QQQ", *fields)
    ruleset = _called(
        _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0), "landlock"
    )
    for path in read_trees:
        access = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE  # noqa: PTH112
        _allow(ruleset, path, access)
    for path in read_listings:
        _allow(ruleset, path, _READ_DIR)
    return ruleset


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = struct.pack("=Qi", access, place)
        _called(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock rule {path}")
    finally:
        os.close(place)


def die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends; ends at once if it has."""
    _called(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "parent death signal")
    if os.getppid() != parent:
        os._exit(1)


def give_up_privileges() -> None:
    """Never gain rights by an exec, never be read by a debugger of the same user."""
    _called(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _called(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def set_limits(cpu_seconds: int, address_space: int) -> None:
    """Per process; they bound the whole because there can be no second process."""
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)
    _limit(resource.RLIMIT_AS, address_space)
    _limit(resource.RLIMIT_FSIZE, 0)  # there is nothing to write; pipes are no files
    _limit(resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_STACK, _STACK_BYTES)
    _limit(resource.RLIMIT_MSGQUEUE, 0)
    _limit(resource.RLIMIT_MEMLOCK, 0)


def _limit(what: int, soft: int, hard: int | None = None) -> None:
    most = resource.getrlimit(what)[1]
    hard = soft if hard is None else hard
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(what, (soft, hard))


def enter_ruleset(ruleset: int) -> None:
    """Put the Landlock rule set on and close it."""
    _called(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock restrict")
    os.close(ruleset)


def enter_filter(instructions: bytes, own_pid_offsets: list[int]) -> None:
    """Put the seccomp filter on, with this process's pid where the placeholder is."""
    code = bytearray(instructions)
    for offset in own_pid_offsets:
        struct.pack_into("<I", code, offset, os.getpid())
    buffer = (ctypes.c_char * len(code)).from_buffer(code)
    program = _FilterProgram(len(code) // 8, ctypes.addressof(buffer))
    _called(
        _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "seccomp"
    )
