"""One process and other layouts over the same training run: what is compared, how, the limits.

A layout rounds in its own way, so its tokens are those of one process until two perturbed logits
are closer than the rounding; from there on its run is another one. So it is compared twice: live up
to the first difference, which must be such a tie, and once more with the tokens of one process put
in the place of its own, which keeps the runs together to the end. tools/layout_replay.py prints
the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rank_harness import run_ranks

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT / "examples" / "stories" / "gdpo.yaml"

MAX_MARGIN = 1e-4
"""Of perturbed logits: two tokens that are closer are a tie."""
MAX_LATER_MARGIN = 1e-3
"""After the first difference of a replayed run: weights part slowly, as Adam turns rounding of
small gradients into whole steps, and ties with them. (1.9e-4 after 20 steps)"""
MAX_LOSS_DIFFERENCE = 1e-4
"""Relative to max(1, |loss|). (1.0e-7 over 20 steps)"""
MAX_GRAD_NORM_DIFFERENCE = 1e-3
"""The same of the gradient norm. (4.0e-5)"""

LAYOUTS: dict[str, list[str]] = {
    "tp2": ["--parallel.tensor_model_parallel_size", "2", "--rollout.tensor_parallel_size", "2"],
    "pp2": ["--parallel.pipeline_model_parallel_size", "2"],
    "dp2": [],
}
"""With TP2 one engine over both ranks; else each rank has one, for half of the prompts."""


@dataclass(frozen=True)
class Comparison:
    """A layout and one process.

    Args:
        own: completions that each rank decoded in the first step.
        same: completions of the first step that are equal, of how many.
        live: partings of the live run's first step that has any; later steps are another run.
        replayed: partings of the replayed run, all steps.
        num_completions: of the record.
        loss: largest difference of a step's loss, relative to max(1, |loss|), replayed.
        grad_norm: the same of the gradient norm.
        logprob: largest difference between the layout's log-prob of a token and that of the engine
            of one process.
    """

    own: list[int]
    same: tuple[int, int]
    live: list[dict[str, Any]]
    replayed: list[dict[str, Any]]
    num_completions: int
    loss: float
    grad_norm: float
    logprob: float

    @property
    def problems(self) -> list[str]:
        """What is not as it must be."""
        found = [f"live: {it} is no tie" for it in self.live if it["margin"] >= MAX_MARGIN]
        for number, it in enumerate(self.replayed):
            if it["margin"] >= (MAX_LATER_MARGIN if number else MAX_MARGIN):
                found.append(f"replayed: {it} is no tie")
        if self.same[0] != self.same[1]:
            found.append(
                f"{self.same[0]} of {self.same[1]} completions of the first step are equal"
            )
        if not self.loss < MAX_LOSS_DIFFERENCE:
            found.append(f"replayed: losses differ by {self.loss:.1e}")
        if not self.grad_norm < MAX_GRAD_NORM_DIFFERENCE:
            found.append(f"replayed: gradient norms differ by {self.grad_norm:.1e}")
        return found


def compare(
    overrides: Sequence[str],
    layouts: Mapping[str, list[str]],
    folder: Path,
    mutants: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> tuple[dict[str, Any], dict[str, Comparison]]:
    """Run one process, then every layout live and replayed, in two launches.

    Args:
        overrides: of the stories example, in all runs.
        layouts: name -> overrides, for two ranks.
        folder: a new one.
        mutants: layout -> mistake (see rank_replay.MUTANTS); none by default. Those with one are
            only replayed.
        timeout: of each launch, seconds.

    Returns:
        What one process did (see rank_replay.run), and the comparisons.
    """
    common: dict[str, Any] = {"config": str(STORIES), "overrides": list(overrides)}
    alone = {"tp1": {"layout": [], "replay": False, "mutant": None}}
    (single,) = run_ranks(
        "rank_replay:run",
        1,
        folder / "one",
        timeout=timeout,
        **common,
        folder=str(folder / "runs"),
        cases=alone,
        record=None,
    )
    tp1 = single["tp1"]
    cases = {
        f"{name} {kind}": {
            "layout": layout,
            "replay": kind == "replayed",
            "mutant": (mutants or {}).get(name),
        }
        for name, layout in layouts.items()
        for kind in ("live", "replayed")
        if kind == "replayed" or name not in (mutants or {})
    }
    ranks = run_ranks(
        "rank_replay:run",
        2,
        folder / "two",
        timeout=timeout,
        **common,
        folder=str(folder / "runs"),
        cases=cases,
        record=tp1["made"],
    )
    return tp1, {
        name: _compared(
            tp1,
            [rank.get(f"{name} live") for rank in ranks],
            [rank[f"{name} replayed"] for rank in ranks],
        )
        for name in layouts
    }


def _compared(
    tp1: dict[str, Any], live: list[dict[str, Any] | None], replayed: list[dict[str, Any]]
) -> Comparison:
    record = tp1["made"]
    own = [run or other for run, other in zip(live, replayed, strict=True)]
    first = {i: made["tokens"] for rank in own for i, made in rank["made"][0].items()}
    same = sum(first[i] == made["tokens"] for i, made in record[0].items())
    partings = _partings([run for run in live if run is not None])
    start = min((parting["step"] for parting in partings), default=None)
    right, metrics = tp1["metrics"], replayed[0]["metrics"]

    def difference(name: str) -> float:
        pairs = list(zip(metrics[name], right[name], strict=True))
        return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)

    return Comparison(
        own=[len(rank["made"][0]) for rank in own],
        same=(same, len(record[0])),
        live=[parting for parting in partings if parting["step"] == start],
        replayed=_partings(replayed),
        num_completions=sum(len(step) for step in record),
        loss=difference("update/loss"),
        grad_norm=difference("optimizer/grad_norm"),
        logprob=max(metrics["update/mismatch_abs_diff_max"]),
    )


def _partings(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all ranks, each once: the ranks of one engine see the same."""
    found = {(p["step"], p["request_id"]): p for rank in ranks for p in rank["partings"]}
    return [found[key] for key in sorted(found)]
