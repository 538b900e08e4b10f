"""Runs the stories example in one process and in other layouts, and prints what differs.

    python tools/layout_replay.py                 # 20 steps; about a quarter of an hour on 2 cores
    python tools/layout_replay.py --steps 3 --rollout.num_prompts_per_step 4      # any other key

Needs the assets ($GDPO_ASSETS). Each layout runs twice on two ranks: live, where its tokens must be
those of one process until a tie of the perturbed logits; and with the completions of one process in
the place of its own, where the losses must agree to the end. In both its engines decode their own
share. What is compared, and the limits: tests/distributed/replay.py. Ends with status 1 where a
limit is exceeded.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests" / "distributed"


def _test_module() -> Any:
    """The tests' comparison, which is no package."""
    if str(TESTS) not in sys.path:
        sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    return importlib.import_module("replay")


def as_markdown(comparisons: Mapping[str, Any]) -> str:
    """The table, one row per layout."""
    lines = [
        "| layout | completions per rank, step 1 | equal in step 1 | first difference, live | its "
        "margin (in one process) | completions that part, replayed | largest margin | losses | "
        "gradient norms | log-probs |",
        "|---" * 10 + "|",
    ]
    for name, it in comparisons.items():
        same, count = it.same
        live = [f"{p['margin']:.1e} ({p['recorded_margin']:.1e})" for p in it.live]
        margins = [p["margin"] for p in it.replayed]
        cells = [
            name,
            " and ".join(map(str, it.own)),
            f"{same} of {count}",
            f"step {it.live[0]['step'] + 1}" if it.live else "none",
            ", ".join(live) or "-",
            f"{len(margins)} of {it.num_completions}",
            f"{max(margins):.1e}" if margins else "-",
            *(f"{value:.1e}" for value in (it.loss, it.grad_norm, it.logprob)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    options, overrides = parser.parse_known_args()
    replay = _test_module()
    with tempfile.TemporaryDirectory() as folder:
        tp1, comparisons = replay.compare(
            ["--train.num_steps", str(options.steps), *overrides],
            replay.LAYOUTS,
            Path(folder) / "replay",
            timeout=3600,
        )
    metrics, made = tp1["metrics"], [it for step in tp1["made"] for it in step.values()]
    print(
        f"one process: {options.steps} steps, {sum(len(it['tokens']) for it in made)} tokens; "
        f"losses from {min(metrics['update/loss']):.3f} to {max(metrics['update/loss']):.3f}; "
        f"log-probs {max(metrics['update/mismatch_abs_diff_max']):.1e}\n"
    )
    print(as_markdown(comparisons))
    for name, it in comparisons.items():
        print(f"\n{name}, replayed:")
        for parting in it.replayed:
            print(f"  {parting}")
    problems = [f"{name}: {line}" for name, it in comparisons.items() for line in it.problems]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
