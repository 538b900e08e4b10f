"""Math verifications per second, hostile inputs mixed in: what the math reward costs a step.

Completions answer with a fraction, a root or a polynomial written in another way than the gold, so
that each one needs math-verify; half of them are right. A hostile one is a tower of powers, a
binomial or a factorial: it is cut off twice and costs a new process each time. Threads stand for
the worker processes of a suite; each has a verifier of its own. Every verdict is checked. Unequal
polynomials take the longest: sympy simplifies their difference before it gives up.

    OMP_NUM_THREADS=1 python tools/bench_math.py
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from gdpo_megatron.rewards.builtin import math
from gdpo_megatron.rewards.builtin.math_verifier import shared_verifier

HOSTILE = (r"9^{9^{9^{9}}}", r"\binom{10^{9}}{5 \cdot 10^{8}}", "100000000!")


@dataclass(frozen=True, slots=True)
class MathRate:
    """Of one measurement: completions judged, of these cut off, time and processor time for all."""

    num_judged: int
    num_cut_off: int
    seconds: float
    cpu_seconds: float


def measure(
    num_completions: int, hostile_every: int | None, *, num_threads: int, timeout: float
) -> MathRate:
    """Judge completions, of which each `hostile_every`-th is hostile, and check the verdicts.

    Raises:
        AssertionError: a verdict is wrong.
    """
    cases = [_case(random.Random(number)) for number in range(num_completions)]
    if hostile_every is not None:
        for place, number in enumerate(range(hostile_every // 2, num_completions, hostile_every)):
            cases[number] = (HOSTILE[place % len(HOSTILE)], "7/3", "timeout")

    def judge(case: tuple[str, str, str]) -> bool:
        answer, gold, expected = case
        verdict = math.judge(rf"It is \boxed{{{answer}}}.", gold, timeout=timeout)
        # On a busy machine a harmless one may be cut off as well; the counts show it.
        assert verdict in (expected, "timeout"), (case, verdict)
        return verdict == "timeout"

    with ThreadPoolExecutor(num_threads) as threads:
        # Processes start before the clock does, as they do before a run's first step is over.
        list(threads.map(lambda _: judge(("0.5", "1/2", "equal")), range(4 * num_threads)))
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        num_cut_off = sum(threads.map(judge, cases))
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu_began
    shared_verifier().close()
    return MathRate(num_completions, num_cut_off, seconds, cpu_seconds)


def _cpu_seconds() -> float:
    """Of this process, its children that have ended, and those that run."""
    me = psutil.Process()
    usages = [me.cpu_times(), *(child.cpu_times() for child in me.children())]
    times = [usage.user + usage.system for usage in usages]
    return sum(times) + usages[0].children_user + usages[0].children_system


def _case(draw: random.Random) -> tuple[str, str, str]:
    a, b, k = draw.randint(2, 40), draw.randint(2, 40), draw.randint(2, 9)
    wrong = draw.randint(0, 1)
    answer, gold = draw.choice(
        [
            (
                rf"\frac{{{a * k}}}{{{(100 * b + 1) * k}}}",
                rf"\dfrac{{{a + wrong}}}{{{100 * b + 1}}}",
            ),
            (rf"\sqrt{{{a * a * 7}}}", rf"{a + wrong}\sqrt{{7}}"),
            (rf"x^2 + {a + b}x + {a * b}", rf"(x + {a})(x + {b + wrong})"),
        ]
    )
    return answer, gold, "different" if wrong else "equal"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num-completions", type=int, default=600)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=math.DEFAULT_TIMEOUT, help="seconds")
    args = parser.parse_args()
    for title, hostile_every in (("no hostile input", None), ("1 in 200 hostile", 200)):
        rate = measure(
            args.num_completions, hostile_every, num_threads=args.num_threads, timeout=args.timeout
        )
        print(
            f"math, {title}: {rate.num_judged / rate.seconds:7.1f} verifications/s, "
            f"{rate.num_judged / rate.cpu_seconds:7.1f} per second of processor time "
            f"({rate.num_judged} in {rate.seconds:.1f} s, {rate.num_cut_off} cut off)"
        )


if __name__ == "__main__":
    main()
