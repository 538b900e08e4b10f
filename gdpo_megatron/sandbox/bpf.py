"""A small assembler for seccomp filters, x86-64: a table of rules in, classic BPF out.

A filter is a straight line. Each rule is a block that begins by comparing the call's number and is
jumped over when it differs; within it, arguments are compared, and a mismatch denies. The kernel
notes for itself which numbers are allowed whatever their arguments, so the line's length costs
little. Source: linux/filter.h, linux/seccomp.h, Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

AUDIT_ARCH_X86_64 = 0xC000003E
X32_BIT = 0x40000000  # the x32 interface: other numbers for the same calls

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000


def errno_action(number: int) -> int:
    """The call is not made and fails with this errno."""
    return 0x00050000 | number


_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data


@dataclass(frozen=True, slots=True)
class Argument:
    """A condition on one argument: (low half & mask) is one of `values`.

    Args:
        index: 0 to 5.
        values: of the low 32 bits, after the mask.
        mask: bits that are looked at.
        wide: the high 32 bits must be 0 as well: for pointers, whose high half counts.
    """

    index: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to one system call; one that fails its conditions is denied."""

    number: int
    arguments: tuple[Argument, ...] = ()
    action: int = ALLOW


def assemble(rules: Sequence[Rule], default: int) -> bytes:
    """Compile a filter.

    Args:
        rules: tried in this order; at most one for a number.
        default: action for every other call, and for x32 ones.

    Returns:
        Array of struct sock_filter, 8 bytes each. Calls through another architecture's entry
        (int 0x80) end the process.
    """
    if len({rule.number for rule in rules}) != len(rules):
        raise ValueError("two rules for one system call")
    program = [_load(_ARCH), _jump(AUDIT_ARCH_X86_64, 1, 0), _return(KILL_PROCESS)]
    program += [_load(_NUMBER), _jump(X32_BIT, 0, 1, _JUMP_GREATER_EQUAL), _return(default)]
    for rule in rules:
        block = _block(rule, default)
        program += [_jump(rule.number, 0, len(block)), *block]
    program.append(_return(default))
    return b"".join(program)


def operand_offsets(program: bytes, operand: int) -> list[int]:
    """Byte offsets of a constant that is to be replaced before the filter is installed."""
    wanted = struct.pack("<I", operand)
    return [i + 4 for i in range(0, len(program), 8) if program[i + 4 : i + 8] == wanted]


def _block(rule: Rule, default: int) -> list[bytes]:
    """Instructions after the number matched; the block always returns."""
    block: list[bytes] = []
    for argument in rule.arguments:
        block += _condition(argument, default)
    return [*block, _return(rule.action)]


def _condition(argument: Argument, default: int) -> Iterable[bytes]:
    low = _ARGS + 8 * argument.index
    if argument.wide:
        yield from (_load(low + 4), _jump(0, 1, 0), _return(default))
    yield _load(low)
    if argument.mask != 0xFFFFFFFF:
        yield struct.pack("<HBBI", _AND, 0, 0, argument.mask)
    for left, value in zip(range(len(argument.values) - 1, -1, -1), argument.values, strict=True):
        yield _jump(value, left + 1, 0)  # over the other values and the return
    yield _return(default)


def _load(offset: int) -> bytes:
    return struct.pack("<HBBI", _LOAD, 0, 0, offset)


def _jump(value: int, if_true: int, if_false: int, kind: int = _JUMP_EQUAL) -> bytes:
    return struct.pack("<HBBI", kind, if_true, if_false, value)


def _return(action: int) -> bytes:
    return struct.pack("<HBBI", _RETURN, 0, 0, action)
