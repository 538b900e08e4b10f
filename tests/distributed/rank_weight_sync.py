"""Weight syncs that are right and spoilt ones, on this rank; see test_weight_sync.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rank_layouts import in_layout  # prepares Megatron  # isort: skip

import torch
import torch.distributed as dist
from support.failing_engine import FailingEngine, unlimited
from support.sabotage import OF_ENGINE, SABOTAGES, Sabotage

from gdpo_megatron.certify.engine_parts import EngineParts
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.rollout.failure import EngineFailure
from gdpo_megatron.weight_sync import SyncFault

CHECKS = {"all": 1, "no checksums": 0}


def run(
    folder: str,
    engine: str,
    layouts: dict[str, dict[str, Any]],
    dtypes: list[str],
    others: list[tuple[str, str, dict[str, Any]]],
    failing: dict[str, list[tuple[str, str]]],
    max_length: int = 64,
) -> dict[str, Any]:
    """All sabotages in all layouts, with and without checksums; engines that fail.

    Args:
        folder: of the model, with a tokenizer.
        engine: a registered rollout engine, one rank each.
        layouts: arguments of `in_layout`, by name.
        dtypes: of the policy, by which the syncs that are right are repeated.
        others: (name, folder, layout) of models and layouts for syncs that are right.
        failing: for a layout, (call, kind) of the failures of the second rank's engine.
        max_length: of prompt and completion.
    """
    results: dict[str, Any] = {}
    for name, other, layout in others:
        with in_layout(**layout) as kwargs:
            job = Job(Path(other), engine, kwargs, "float32", max_length)
            results[name] = job.right()
            job.close()
    for name, layout in layouts.items():
        with in_layout(**layout) as kwargs:
            for dtype in dtypes:
                job = Job(Path(folder), engine, kwargs, dtype, max_length)
                results[f"{name} {dtype}"] = job.right()
                if dtype == dtypes[0]:
                    for case, sabotage in (SABOTAGES | OF_ENGINE.get(engine, {})).items():
                        if sabotage.layouts is None or name in sabotage.layouts:
                            results[f"{name} {case}"] = job.spoilt(sabotage)
                    for call, kind in failing.get(name, []):
                        results[f"{name} {call} {kind}"] = job.failed(call, kind)
                job.close()
    return results


class Job(EngineParts):
    """Parts that can be spoilt."""

    def spoilt(self, sabotage: Sabotage) -> dict[str, Any]:
        """What sees it, and what is said, with all checks and without checksums."""
        found: dict[str, Any] = {}
        for checks, interval in CHECKS.items():
            engine = sabotage.engine(self.engine) if sabotage.from_the_first else self.engine
            self.engine.wake()
            self.sync(engine, interval).run(1)
            self.change()
            if engine is self.engine:
                engine = sabotage.engine(self.engine)
            try:
                with sabotage.policy(self.policy):
                    self.sync(engine, interval).run(2)
                found[checks] = {"checks": [], "lines": []}
            except SyncFault as fault:
                found[checks] = {"checks": sorted(fault.checks), "lines": fault.problems}
            self.engine.sleep()
            self.restore()
        return found

    def failed(self, call: str, kind: str) -> dict[str, Any]:
        """What is said when a call of one engine fails, and the canary of a sync after that."""
        limit = unlimited()
        engine: Any = self.engine
        if dist.get_rank() == 1:
            engine = FailingEngine(self.engine, call, kind, limit)
        sync = self.sync(engine)
        sync.stall = limit
        lines: list[str] = []
        try:
            sync.run(1)
            sync.release()
        except (SyncFault, EngineFailure) as error:
            lines = error.problems
        self.engine.abort(range(len(self.prompts)))
        while self.engine.num_unfinished:
            self.engine.poll()
        after = self.sync(self.engine)
        self.change()
        difference = after.run(2).metrics()["weight_sync/canary_max_logprob_diff"]
        after.release()
        self.restore()
        return {"lines": lines, "difference": difference}


def buckets(cases: dict[str, tuple[str, dict[str, Any]]], sizes: list[int]) -> dict[str, Any]:
    """The stream in buckets of several sizes: equality and collectives.

    Args:
        cases: name -> (model folder, arguments of `in_layout`).
        sizes: in bytes.
    """
    results: dict[str, Any] = {}
    for name, (folder, layout) in cases.items():
        with in_layout(**layout) as kwargs:
            job = Job(Path(folder), "native", kwargs, "float32", 64)
            reader = HFCheckpoint(Path(folder), job.policy.arch)
            for size in sizes:
                with _counted() as calls:
                    kept = list(job.policy.hf_tensors(size))
                results[f"{name} {size}"] = {
                    "calls": calls,
                    "wrong": [n for n, x in kept if not torch.equal(x, reader.get(n))],
                    "names": [n for n, _ in kept],
                }
    return results


@contextmanager
def _counted() -> Iterator[list[int]]:
    """[all-gathers, broadcasts] of the stream."""
    calls = [0, 0]

    def counting(index: int, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[index] += 1
            return function(*args, **kwargs)

        return call

    gather, broadcast = dist.all_gather_into_tensor, dist.broadcast
    with (
        mock.patch.object(dist, "all_gather_into_tensor", counting(0, gather)),
        mock.patch.object(dist, "broadcast", counting(1, broadcast)),
    ):
        yield calls
