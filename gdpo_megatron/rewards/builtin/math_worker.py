"""Compares two mathematical expressions with math-verify; a process of its own, killed at will.

Run as a script by `math_verifier`, never imported by the package. It answers lines of JSON on a
pipe: `{"gold": ..., "answer": ...}` in, `{"equal": true}` or `{"error": reason}` out, after a first
line that says it is ready. Nothing in here limits the time: sympy may spend minutes inside one C
call, which no signal interrupts, so the parent kills the process.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1


def _confine(parent_pid: int, max_memory_bytes: int) -> None:
    # The parent may be killed while this process computes: the kernel then ends it as well.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        sys.exit(1)
    # Ctrl-C reaches the whole process group; only the parent decides when a verification ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:  # a worker of rewards may have one already
        max_memory_bytes = min(max_memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _load_compare() -> Any:
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    # Only the box: a number elsewhere in the text is not the answer.
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def expressions(text: str) -> Any:
        # Its own timeout uses SIGALRM and makes an empty list, later False, of an overrun.
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)  # pyright: ignore

    def compare(gold: str, answer: str) -> bool:
        # The order matters: the comparison is not symmetric.
        return verify(expressions(gold), expressions(answer), timeout_seconds=None)

    # The first comparisons cost a hundred times a later one.
    if not compare("\\frac{1}{2}", "0.5") or compare("\\sqrt{2}", "x^2 + 1"):
        raise RuntimeError("math-verify fails a comparison that it is known to pass")
    return compare


def main(parent_pid: int, max_memory_bytes: int) -> None:
    """Answer lines of standard input until it ends."""
    _confine(parent_pid, max_memory_bytes)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not look like a reply
    try:
        compare = _load_compare()
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), file=replies)
        return
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply: dict[str, Any] = {"equal": bool(compare(request["gold"], request["answer"]))}
        except MemoryError:
            reply = {"error": "memory"}
        except BaseException as error:  # math-verify's timeout exception is no Exception
            reply = {"error": f"raised {type(error).__name__}"}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
