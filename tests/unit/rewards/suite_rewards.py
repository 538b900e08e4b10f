"""Reward functions for the tests of the suite: its workers find them here, by file and name.

What they do follows from the completion, so that a test says in its texts which sample does what.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from support import told_time

from gdpo_megatron.rewards import (
    NOT_APPLICABLE,
    RewardSample,
    count_event,
    invalid,
    register_reward,
)
from gdpo_megatron.rewards.builtin.math import math_correctness

TOWER = r"9^{9^{9^{9}}}"
"""sympy would compute for hours."""


def one(sample: RewardSample) -> float:
    return 1.0


def number(sample: RewardSample) -> float:
    return float(sample.completion)


def look(sample: RewardSample) -> Any:
    """Says in its reason what it was given."""
    return invalid("seen", repr(sample))


def plain_scalars(sample: RewardSample) -> Any:
    import numpy as np
    import torch

    values = [True, 2, 0.5, np.float32(0.25), np.int64(3), np.bool_(False), torch.tensor(1.5)]
    return values[int(sample.completion)]


# ---- faults --------------------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def boom(kind: type[BaseException], *args: object) -> Any:
    raise kind(*args)


async def forgotten() -> float:
    return 1.0


def array() -> Any:
    import numpy as np

    return np.array([1.0])


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "raise": (lambda: boom(ValueError, "bad row"), "raised ValueError: bad row"),
    "exit": (lambda: sys.exit(3), "raised SystemExit: 3"),
    "unprintable": (lambda: boom(Unprintable), "raised Unprintable: (its message cannot be shown)"),
    "long": (lambda: boom(ValueError, "x" * 1000), f"raised ValueError: {'x' * 200}..."),
    "half": (lambda: boom(ValueError, "\ud800"), "raised ValueError: ?"),
    "none": (lambda: None, "returned NoneType: None"),
    "string": (lambda: "1.0", "returned str: '1.0'"),
    "list": (lambda: [1.0], "returned list: [1.0]"),
    "array": (array, "returned ndarray: array([1.])"),
    "complex": (lambda: 1j, "returned complex: 1j"),
    "nan": (lambda: math.nan, "not finite: returned nan"),
    "inf": (lambda: -math.inf, "not finite: returned -inf"),
    "huge": (lambda: 10**400, "not finite: returned inf"),
    "said": (lambda: invalid("no oracle", "row 7"), "no oracle: row 7"),
    "short": (lambda: invalid("no oracle"), "no oracle"),
    "forgotten": (forgotten, "returned coroutine: declare the function with 'async def'"),
    "fine": (lambda: 0.5, ""),
}


def faulty(sample: RewardSample) -> Any:
    return FAULTS[sample.completion][0]()


BATCH_RESULTS: dict[str, Callable[[], Any]] = {
    "few": lambda: [1.0],
    "many": lambda: [1.0] * 3,
    "string": lambda: "ab",
    "mapping": lambda: {0: 1.0, 1: 1.0},
    "set": lambda: {1.0, 2.0},
    "generator": lambda: (1.0 for _ in range(2)),
    "none": lambda: None,
    "coroutine": forgotten,
    "raise": lambda: 1 / 0,
    "one bad": lambda: [None, 0.5],
    "fine": lambda: (0.25, 0.5),
}


@register_reward("test_faulty_batch", batch=True)
def faulty_batch(samples: Sequence[RewardSample]) -> Any:
    return BATCH_RESULTS[samples[0].completion]()


def only_math(sample: RewardSample) -> Any:
    return 1.0 if sample.completion == "math" else NOT_APPLICABLE


def part(sample: RewardSample, index: int) -> Any:
    """A word of the completion: a number, or x for invalid, n for not applicable."""
    word = sample.completion.split()[index]
    return {"x": invalid(f"gone {index}"), "n": NOT_APPLICABLE}.get(word) or float(word)


# ---- forms ---------------------------------------------------------------------------------------


@register_reward("test_rank", batch=True)
def rank(samples: Sequence[RewardSample], scale: float = 1.0) -> list[float]:
    texts = [sample.completion for sample in samples]
    return [scale * texts.index(text) for text in texts]


@register_reward("test_group_mean", batch=True)
async def group_mean(samples: Sequence[RewardSample]) -> list[float]:
    return [sum(float(ord(s.completion)) for s in samples) / len(samples)] * len(samples)


_arrived = 0
_all_arrived = asyncio.Event()


async def together(sample: RewardSample, num: int) -> float:
    """One after the other, this would never end."""
    global _arrived
    _arrived += 1
    if _arrived == num:
        _all_arrived.set()
    await _all_arrived.wait()
    return float(sample.completion)


_running = 0


async def side_by_side(sample: RewardSample, num: int) -> float:
    """How many calls there are at a time, this one included; until there were `num`, all wait."""
    global _running
    _running += 1
    here = _running
    if here == num:
        _all_arrived.set()
    await _all_arrived.wait()
    await asyncio.sleep(0.05)  # for one too many to come
    _running -= 1
    return float(here)


async def waits(sample: RewardSample) -> Any:
    """By the completion: hangs, blocks the loop, hangs refusing to be cancelled, fails, leaves."""
    if sample.completion == "hang":
        await told_time.be_overdue()
        await asyncio.sleep(1000)
    if sample.completion == "block":
        await asyncio.sleep(0.1)
        told_time.say(told_time.FOREVER)
        time.sleep(1000)
    if sample.completion == "stubborn":
        # From outside of this call's code: it is not what keeps the loop.
        asyncio.get_running_loop().call_soon(told_time.say, told_time.FOREVER)
        while True:
            try:
                await told_time.be_overdue()
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue
    if sample.completion == "exit":
        sys.exit(1)
    if sample.completion == "own timeout":
        raise TimeoutError("the server did not answer")
    await asyncio.sleep(0.2)
    return 1.0


class Countdown:
    """Counts its calls: its results depend on what came before."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, sample: RewardSample) -> float:
        self.num_calls += 1
        if sample.completion == "hang":
            told_time.say(told_time.FOREVER)
            time.sleep(1000)
        return float(self.num_calls)


countdown = register_reward("test_countdown", stateful=True)(Countdown())

_seen: list[str] = []


@register_reward("test_novelty", batch=True, stateful=True)
async def novelty(samples: Sequence[RewardSample]) -> list[float]:
    """How many completions there were before the group's, in all groups before."""
    before = len(_seen)
    _seen.extend(sample.completion for sample in samples)
    return [float(before)] * len(samples)


# ---- what ends a worker --------------------------------------------------------------------------


def ends(sample: RewardSample) -> Any:
    """By the completion, what the pool has to deal with; 2.0 for any other."""
    if sample.completion == "hang":
        told_time.say(told_time.FOREVER)
        while True:
            pass
    if sample.completion == "deaf":
        for number in range(1, signal.NSIG):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                continue
        told_time.say(told_time.FOREVER)
        time.sleep(1000)
    if sample.completion == "segfault":
        ctypes.string_at(0)
    if sample.completion == "leave":
        os._exit(7)
    if sample.completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sample.completion == "bomb":
        held = bytearray(600 * 2**20)  # above the tests' limit, and kept until that is seen
        time.sleep(1000 + len(held))
    if sample.completion == "fork":
        os.fork()
    if sample.completion == "scribble":
        for entry in list(Path("/proc/self/fd").iterdir()):
            if int(entry.name) > 2:
                try:
                    os.write(int(entry.name), b'{"job": 0}\n')
                except OSError:
                    continue
    return 2.0


def once(sample: RewardSample, folder: str) -> float:
    """Ends its worker at the first call of a sample, not at the second."""
    marker = Path(folder) / sample.completion
    if sample.completion.startswith("x") and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 3.0


_leak: list[bytearray] = []


def leaks(sample: RewardSample, mib: int) -> float:
    _leak.append(bytearray(os.urandom(1)) * (mib * 2**20))
    time.sleep(0.03)
    return float(sample.completion)


_files: list[Any] = []


def leaks_files(sample: RewardSample, num: int) -> float:
    _files.extend(open(os.devnull) for _ in range(num))  # noqa: PTH123
    time.sleep(0.3)
    return float(sample.completion)


def starts_others(sample: RewardSample, folder: str) -> float:
    """Starts a child, and one that leaves its process group; notes their ids; then hangs."""
    for number, new_session in enumerate((False, True)):
        child = subprocess.Popen(["sleep", "1000"], start_new_session=new_session)
        (Path(folder) / f"{sample.completion}_{number}").write_text(str(child.pid))
    (Path(folder) / f"{sample.completion}_own").write_text(str(os.getpid()))
    if sample.completion != "returns":
        told_time.say(told_time.FOREVER)
        time.sleep(1000)
    return 1.0


# ---- time ----------------------------------------------------------------------------------------


def uneven(sample: RewardSample) -> Any:
    time.sleep(random.random() / 500)
    value = int(sample.completion)
    if value % 7 == 0:
        raise ValueError(f"row {value}")
    return NOT_APPLICABLE if value % 11 == 0 else value / 3


async def later(sample: RewardSample) -> float:
    await asyncio.sleep(random.random() / 500)
    return float(sample.completion) ** 0.5


@register_reward("test_share", batch=True)
def share(samples: Sequence[RewardSample]) -> list[float]:
    return [float(sample.completion) / len(samples) for sample in samples]


def rendezvous(sample: RewardSample, folder: str) -> float:
    """`slow` waits for a file that nobody writes before `release`; others leave one behind."""
    if sample.completion == "slow":
        while not (Path(folder) / "release").exists():
            time.sleep(0.01)
    else:
        (Path(folder) / f"done_{sample.completion}").touch()
    return 1.0


def gets_stuck(sample: RewardSample) -> float:
    if sample.completion == "stuck":
        told_time.be_stuck()
        time.sleep(1000)
    return 1.0


def takes(sample: RewardSample) -> float:
    """As many seconds as the completion says."""
    told_time.pass_time(float(sample.completion))
    return 1.0


def counts(sample: RewardSample) -> float:
    count_event("seen")
    count_event("letters", len(sample.completion))
    return 0.0


def prints(sample: RewardSample) -> float:
    print(f"out {sample.completion}")
    print(f"err {sample.completion}", file=sys.stderr)
    os.system(f"echo child {sample.completion}")
    return 1.0


def heavy_modules(sample: RewardSample) -> float:
    return float(len({"torch", "megatron", "transformers"} & set(sys.modules)))


def threads(sample: RewardSample) -> float:
    return float(len(list(Path("/proc/self/task").iterdir())))


def sandbox_memory(sample: RewardSample) -> float:
    from gdpo_megatron.sandbox import shared_config

    return float(shared_config().memory_mb)


def own_pid(sample: RewardSample) -> float:
    return float(os.getpid())


@register_reward("test_takes_batch", batch=True)
def takes_batch(samples: Sequence[RewardSample]) -> list[float]:
    told_time.pass_time(float(samples[0].completion))
    return [1.0] * len(samples)


# ---- math ----------------------------------------------------------------------------------------


def math_in_time(sample: RewardSample, **options: Any) -> Any:
    """math_correctness with all the time it needs, but for what would need hours."""
    timeout = 0.3 if TOWER in sample.completion else 600.0
    return math_correctness(sample, timeout=timeout, **options)


def math_that_hangs(sample: RewardSample) -> Any:
    """math_correctness whose call is over its time once its verifier is at a tower."""
    if TOWER in sample.completion:
        threading.Thread(target=_say_when_verifying, daemon=True).start()
    return math_correctness(sample, timeout=1000.0)


def verifiers(pid: int) -> list[psutil.Process]:
    """The processes below this one that compare expressions."""
    found: list[psutil.Process] = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie's error is one of these
            if any("math_worker" in part for part in process.cmdline()):
                found.append(process)
    return found


def _say_when_verifying() -> None:
    while not verifiers(os.getpid()):
        time.sleep(0.01)
    told_time.say(told_time.FOREVER)
