"""What rewards cost on the CPU: a table of rows, measured in one run on an idle machine.

sandbox, MODE:  programs per second of the sandbox by as many workers as there are usable cores, and
                the median of one program by one worker, for a program that prints a number and for
                the reference solutions of HumanEval with one test each (left out without assets).

suite:          processor time that running rewards in processes adds to them, for rewards that
                take next to nothing, 1, 5 and 20 ms a rollout; see bench_reward_suite.py.

math:           verifications per second of answers that only math-verify can judge, and with one in
                200 that would run for hours.

    OMP_NUM_THREADS=1 python tools/bench_rewards.py [ROW ...]

A row is a function in ROWS that yields (what, value, unit); other parts of the rewards add theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_math import measure as math_rate
from bench_reward_suite import suite_overhead

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.registry import Registry
from gdpo_megatron.sandbox import Sandbox, SandboxUnavailable, Status

Row = tuple[str, float, str]
ROWS = Registry[Callable[[], Iterator[Row]]]("row")

_ASSETS = Path(os.environ.get("GDPO_ASSETS", Path(__file__).parents[2] / "shared"))
_WARM_UP, _NUM_RUNS = 20, 400


@ROWS.register("sandbox")
def sandbox_rows() -> Iterator[Row]:
    """Executions per second and milliseconds per execution in each mode of this machine."""
    cores = len(os.sched_getaffinity(0))
    loads = {"print": ["print(sum(range(10)))"] * _NUM_RUNS}
    if reference := _reference_programs():
        loads["HumanEval"] = reference
    for mode in ("bwrap", "inner"):
        try:
            with Sandbox(SandboxConfig(mode=mode)) as one:
                for load, programs in loads.items():
                    yield (f"sandbox {mode}, {load}, median", 1e3 * _median(one, programs), "ms")
            with Sandbox(SandboxConfig(mode=mode), num_workers=cores) as all_cores:
                for load, programs in loads.items():
                    rate = _rate(all_cores, programs, cores)
                    yield (f"sandbox {mode}, {load}, {cores} workers", rate, "programs/s")
        except SandboxUnavailable as error:
            print(f"sandbox {mode} is left out: {error}")


def _median(sandbox: Sandbox, programs: Sequence[str]) -> float:
    times: list[float] = []
    for program in [*programs[:_WARM_UP], *programs]:
        began = time.perf_counter()
        _run(sandbox, program)
        times.append(time.perf_counter() - began)
    return statistics.median(times[_WARM_UP:])


def _rate(sandbox: Sandbox, programs: Sequence[str], num_threads: int) -> float:
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(lambda program: _run(sandbox, program), programs[:_WARM_UP]))
        began = time.perf_counter()
        list(threads.map(lambda program: _run(sandbox, program), programs))
        return len(programs) / (time.perf_counter() - began)


def _run(sandbox: Sandbox, program: str) -> None:
    done = sandbox.run(program)
    assert done.status is Status.OK, done


def _reference_programs() -> list[str]:
    """Each solution with its whole check behind it."""
    path = _ASSETS / "data/humaneval/test.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\ncheck({row['entry_point']})\n"
        for row in rows
    ]


@ROWS.register("suite")
def suite_rows() -> Iterator[Row]:
    """Share and microseconds per rollout that the suite adds to its rewards."""
    for overhead in suite_overhead():
        bare = 1e3 * overhead.bare.processor / overhead.num_rollouts
        load = f"suite, rewards of {bare:.3g} ms a rollout"
        yield (f"{load}, overhead", 100 * overhead.share, "%")
        yield (f"{load}, overhead", overhead.microseconds, "us")


@ROWS.register("math")
def math_rows() -> Iterator[Row]:
    """Verifications per second, with and without answers that would run for hours."""
    for what, every in (("math", None), ("math, 1 in 200 hostile", 200)):
        rate = math_rate(600, every, num_threads=os.cpu_count() or 1, timeout=3.0)
        yield (what, rate.num_judged / rate.seconds, "verifications/s")
        yield (f"{what}, cut off", rate.num_cut_off, "of 600")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("row", nargs="*", help=f"default: all of {', '.join(ROWS.names())}")
    try:
        for name in parser.parse_args().row or ROWS.names():
            for what, value, unit in ROWS.get(name)():
                print(f"{what:48} {value:10.2f} {unit}", flush=True)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
