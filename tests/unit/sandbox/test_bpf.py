"""The assembler, by an interpreter of classic BPF: what each filter answers to each call.

The interpreter below is written from the kernel's description of the instructions. Not covered:
that the kernel agrees; tests/security installs the filter and attacks it.
"""

from __future__ import annotations

import struct

import pytest

from gdpo_megatron.sandbox.bpf import (
    ALLOW,
    AUDIT_ARCH_X86_64,
    KILL_PROCESS,
    Argument,
    Rule,
    assemble,
    errno_action,
    operand_offsets,
)
from gdpo_megatron.sandbox.syscalls import OWN_PID, program_filter

EPERM, ENOSYS = errno_action(1), errno_action(38)
I386 = 0x40000003


def answer(program: bytes, number: int, *arguments: int, arch: int = AUDIT_ARCH_X86_64) -> int:
    """What a filter says to a call."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *(a & (1 << 64) - 1 for a in padded))
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator = position = 0
    while True:
        code, if_true, if_false, operand = instructions[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x15:
            position += if_true if accumulator == operand else if_false
        elif code == 0x35:
            position += if_true if accumulator >= operand else if_false
        else:
            assert code == 0x06
            return operand


@pytest.fixture(scope="module")
def small() -> bytes:
    rules = [
        Rule(1),
        Rule(2, action=ENOSYS),
        Rule(3, (Argument(0, (5, 7)),)),
        Rule(4, (Argument(1, (0x10,), mask=0x30), Argument(2, (0,), wide=True))),
    ]
    return assemble(rules, EPERM)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ((1,), ALLOW),
        ((2,), ENOSYS),
        ((0,), EPERM),
        ((99,), EPERM),
        ((3, 5), ALLOW),
        ((3, 7), ALLOW),
        ((3, 6), EPERM),
        ((3, (9 << 32) | 5), ALLOW),  # an int to the kernel: the high half does not count
        ((4, 0, 0x10, 0), ALLOW),
        ((4, 0, 0xD1, 0), ALLOW),  # bits outside of the mask
        ((4, 0, 0x30, 0), EPERM),
        ((4, 0, 0x10, 1), EPERM),
        ((4, 0, 0x10, 1 << 40), EPERM),  # a pointer: the high half counts
        ((0x40000001,), EPERM),  # x32
    ],
)
def test_rules(small: bytes, call: tuple[int, ...], expected: int):
    assert answer(small, *call) == expected


def test_other_architecture_is_killed(small: bytes):
    assert answer(small, 1, arch=I386) == KILL_PROCESS


def test_two_rules_for_one_call():
    with pytest.raises(ValueError, match="two rules"):
        assemble([Rule(1), Rule(1, action=ENOSYS)], EPERM)


THREAD, NEW_USER = 0x3D0F00, 0x10000000  # the flags that libc gives pthread_create


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("read", (0, 0, 0, 0), ALLOW),
        ("exit_group", (231, 0), ALLOW),
        ("thread", (56, THREAD), ALLOW),
        ("fork by clone", (56, 0x1200011), EPERM),
        ("thread in a user namespace", (56, THREAD | NEW_USER), EPERM),
        ("clone3", (435,), ENOSYS),
        ("fork", (57,), EPERM),
        ("vfork", (58,), EPERM),
        ("execve", (59,), EPERM),
        ("execveat", (322,), EPERM),
        ("kill another", (62, 1, 9), EPERM),
        ("kill everybody", (62, -1, 9), EPERM),
        ("kill oneself", (62, OWN_PID, 9), ALLOW),
        ("tgkill another", (234, 1, 1, 9), EPERM),
        ("tkill", (200, 1, 9), EPERM),
        ("socket", (41, 2, 1, 0), EPERM),
        ("ptrace", (101,), EPERM),
        ("prctl", (157, 4), EPERM),
        ("isatty", (16, 0, 0x5401), ALLOW),
        ("stuff a terminal", (16, 0, 0x5412), EPERM),
        ("dup by fcntl", (72, 0, 0), ALLOW),
        ("own a file", (72, 0, 8), EPERM),
        ("read own limits", (302, 0, 7, 0), ALLOW),
        ("set own limits", (302, 0, 7, 1 << 40), EPERM),
        ("limits of another", (302, 1, 7, 0), EPERM),
        ("io_uring", (425,), EPERM),
        ("chmod", (90,), EPERM),
        ("memfd", (319,), EPERM),
        ("x32 read", (0x40000000,), EPERM),
    ],
)
def test_filter_of_programs(name: str, call: tuple[int, ...], expected: int):
    assert answer(program_filter(), *call) == expected


def test_own_pid_is_replaced():
    program = bytearray(program_filter())
    offsets = operand_offsets(bytes(program), OWN_PID)
    assert len(offsets) == 2  # kill and tgkill
    for offset in offsets:
        struct.pack_into("<I", program, offset, 4711)
    assert answer(bytes(program), 62, 4711, 9) == ALLOW
    assert answer(bytes(program), 234, 4711, 4711, 9) == ALLOW
    assert answer(bytes(program), 62, 4712, 9) == EPERM
