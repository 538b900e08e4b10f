"""Time of the advantage stage against two other ways to compute the same thing, in one run.

ours:   compute_advantages with preset trl, float64, everything included (validation, both stages).
trl:    TRL's aggregation `normalize_then_sum` on a [P, G, K] view in float32, from its formula.
        TRL has it inside a trainer method that also generates, so it is expressed again here; the
        numbers are checked against ours, and tests/unit/algorithms/test_trl.py runs TRL itself.
loop:   a Python loop over rows and groups per reward, as verl's compute_grpo_outcome_advantage,
        in float32, without the token dimension it also carries.

All three get what the fastest takes for granted: rows sorted by group, nothing missing, groups of
equal size. `shuffled` is ours on rows in random order, which the reshape of trl cannot do. Times
are the best of several repeats (of the loop: of one); "one pass" is the copy of
the rewards to float64 and one multiplication into an existing buffer.

    OMP_NUM_THREADS=1 python tools/bench_advantage.py
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from gdpo_megatron.algorithms import compute_advantages
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.types import RewardMatrix


def nanstd(values: Tensor, dim: int | None = None) -> Tensor:
    """Unbiased std that leaves NaN out, with torch operations as TRL's helper."""
    mean = torch.nanmean(values, dim=dim, keepdim=dim is not None)
    variance = torch.nanmean((values - mean) ** 2, dim=dim, keepdim=dim is not None)
    counted = ~values.isnan()
    count = counted.sum() if dim is None else counted.sum(dim=dim, keepdim=True)
    return (variance * count / (count - 1)).sqrt()


def trl_formula(values: Tensor, group_size: int) -> Tensor:
    """normalize_then_sum with weights 1: per reward and group, sum, then over the batch."""
    grouped = values.view(-1, group_size, values.shape[1])
    mean = torch.nanmean(grouped, dim=1, keepdim=True)
    normalized = ((grouped - mean) / (nanstd(grouped, dim=1) + 1e-4)).view_as(values)
    summed = normalized.nansum(dim=1)
    summed[values.isnan().all(dim=1)] = torch.nan
    advantages = (summed - torch.nanmean(summed)) / (nanstd(summed) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


def python_loop(values: Tensor, group_ids: list[int]) -> Tensor:
    """A dictionary of groups per reward, filled and read row by row."""
    summed = torch.zeros(len(values))
    for k in range(values.shape[1]):
        scores = values[:, k].clone()
        by_group: dict[int, list[Tensor]] = defaultdict(list)
        for i, group in enumerate(group_ids):
            by_group[group].append(scores[i])
        mean = {group: torch.stack(members).mean() for group, members in by_group.items()}
        std = {group: torch.stack(members).std() for group, members in by_group.items()}
        for i, group in enumerate(group_ids):
            scores[i] = (scores[i] - mean[group]) / (std[group] + 1e-4)
        summed += scores
    return (summed - summed.mean()) / (summed.std() + 1e-4)


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def best_time(function: Callable[[], Tensor], repeats: int) -> float:
    """Seconds of the fastest call."""
    return min(timed(function)[0] for _ in range(repeats))


def measure(num_rows: int, num_rewards: int, group_size: int, max_loop_rows: int) -> list[str]:
    """One line of the table."""
    generator = torch.Generator().manual_seed(0)
    num_rows -= num_rows % group_size
    values = torch.rand(num_rows, num_rewards, generator=generator)
    group_ids = torch.arange(num_rows) // group_size
    names = tuple(f"reward_{k}" for k in range(num_rewards))
    valid = torch.ones_like(values, dtype=torch.bool)
    rewards = RewardMatrix(names, values, valid, group_ids)
    order = torch.randperm(num_rows, generator=generator)
    shuffled = RewardMatrix(names, values[order], valid, group_ids[order])
    config = AdvantageConfig.from_preset("trl")

    expected = compute_advantages(rewards, config).advantages.float()
    torch.testing.assert_close(trl_formula(values, group_size), expected, rtol=1e-4, atol=1e-4)
    repeats = 20 if num_rows <= 10_000 else 5
    ours = best_time(lambda: compute_advantages(rewards, config).advantages, repeats)
    mixed = best_time(lambda: compute_advantages(shuffled, config).advantages, repeats)
    trl = best_time(lambda: trl_formula(values, group_size), repeats)
    buffer = torch.empty(num_rows, num_rewards, dtype=torch.float64)
    one_pass = best_time(lambda: torch.mul(values.double(), 2.0, out=buffer), repeats)
    line = [f"{num_rows:,}", f"{ours * 1e3:.2f}", f"{mixed * 1e3:.2f}", f"{trl * 1e3:.2f}"]
    line += [f"{ours / trl:.2f}", f"{ours / one_pass:.1f}"]
    if num_rows <= max_loop_rows:
        ids = group_ids.tolist()
        loop, result = timed(lambda: python_loop(values, ids))
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        return [*line, f"{loop * 1e3:,.0f}", f"{loop / ours:,.0f}"]
    return [*line, "not run", "not run"]


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description="Time of the advantage stage.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--num-rewards", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-loop-rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    head = ["B", "ours ms", "ours, shuffled ms", "TRL formula ms", "ours / TRL"]
    head += ["ours / one pass", "loop ms", "loop / ours"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), ", end="")
    print(f"K={arguments.num_rewards}, G={arguments.group_size}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---:|" * len(head))
    for num_rows in arguments.rows:
        line = measure(
            num_rows, arguments.num_rewards, arguments.group_size, arguments.max_loop_rows
        )
        print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
