"""Rollout engines over two ranks; see test_rollout_ranks.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.engines import ONE_RANK, ScriptedEngine, drain, greedy, native_engine, request

from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import FinishedCompletion
from gdpo_megatron.rollout.failure import EngineFailure
from gdpo_megatron.rollout.runner import run_rollouts
from gdpo_megatron.types import Prompt


def complete(
    folder: Path, prompts: Sequence[Sequence[int]], mesh: EngineMesh, **options: Any
) -> list[dict[str, Any]]:
    """Completions of a prompt each, plain data; all that an engine can do is on the way."""
    engine = native_engine(folder, mesh=mesh, max_concurrent_sequences=7)
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    sampling = greedy(16, **options)
    engine.submit(requests[:4], sampling)
    done = {it.request_id: it for it in engine.poll()}
    engine.submit(requests[4:], sampling)
    done |= drain(engine)
    return [
        {
            "tokens": list(done[i].completion.token_ids),
            "logprobs": list(done[i].completion.logprobs),
            "reason": done[i].completion.finish_reason,
        }
        for i in range(len(prompts))
    ]


def two_engines_and_one_over_two(
    folders: Sequence[str], prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Everything of the test in one launch."""
    platform = detect_platform()
    platform.setup(0)
    dist.init_process_group(platform.backend)
    rank = dist.get_rank()
    over_two = EngineMesh(
        replica=0, num_replicas=1, tp_rank=rank, tp_size=2, tp_group=dist.group.WORLD
    )
    return {
        "tp2": [complete(Path(f), prompts, over_two, **o) for f in folders for o in options],
        "tp1": [complete(Path(f), prompts, ONE_RANK, **o) for f in folders for o in options],
        "replicas": _replicas(rank),
        "failure": _failure(rank),
    }


def _failure(rank: int) -> list[str]:
    """What each rank raises when the engine of the second one does."""
    mesh = EngineMesh(replica=rank, num_replicas=2, tp_rank=0, tp_size=1, tp_group=None)
    prompts = [Prompt(prompt_id=str(i), token_ids=(i + 1,), text="") for i in range(3)]
    engine = ScriptedEngine({(i + 1,): (5, 6) for i in range(3)}, {}, max_sequence_length=16)
    engine.load_weights([], 1)
    if rank == 1:

        def poll() -> list[FinishedCompletion]:
            raise MemoryError("no room")

        engine.poll = poll
    rewards = [RewardConfig(name="short", type="length", args={"limit": 2})]
    with RewardSuite(rewards, group_size=2) as suite:
        try:
            run_rollouts(
                prompts,
                group_size=2,
                sampling=greedy(8),
                engine=engine,
                engines=mesh,
                suite=suite,
                platform=detect_platform(),
                seed=0,
                stream="train",
                step=0,
            )
        except EngineFailure as error:
            return error.problems
    return []


def _replicas(rank: int) -> list[dict[str, Any]]:
    """Three prompts, then one, over two engines: uneven, then one engine idle."""
    mesh = EngineMesh(replica=rank, num_replicas=2, tp_rank=0, tp_size=1, tp_group=None)
    results: list[dict[str, Any]] = []
    for number in (3, 1):
        prompts = [
            Prompt(prompt_id=str(i), token_ids=(i + 1,), text="x" * i) for i in range(number)
        ]
        answers = {(i + 1,): tuple(range(i + 2)) for i in range(number)}
        engine = ScriptedEngine(answers, {}, max_sequence_length=16)
        engine.load_weights([], 1)
        rewards = [RewardConfig(name="short", type="length", args={"limit": 2})]
        with RewardSuite(rewards, group_size=2) as suite:
            batch = run_rollouts(
                prompts,
                group_size=2,
                sampling=greedy(8),
                engine=engine,
                engines=mesh,
                suite=suite,
                platform=detect_platform(),
                seed=0,
                stream="train",
                step=0,
            )
        results.append(
            {
                "own": sorted(batch.rollouts),
                "lengths": batch.lengths,
                "finish": batch.finish,
                "values": batch.rewards.values,
                "valid": batch.rewards.valid,
                "raw": batch.raw,
                "group_ids": batch.rewards.group_ids,
                "replica_of": torch.tensor(batch.replica_of),
            }
        )
    return results
