"""Weight sync where trainer and engine live in the same ranks: a stream of tensors, no copy of all.

The policy yields its weights in buckets under their Hugging Face names, gathered from its own
layout; the engine takes its part of each for its own. What proves that it did is in proof.py,
checksum.py and canary.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist

from gdpo_megatron.config.weight_sync import WeightSyncConfig
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.rollout.base import FinishedCompletion, ReadableEngine, RolloutEngine
from gdpo_megatron.rollout.failure import EngineFailure
from gdpo_megatron.rollout.stall import StallLimit, StallWatch
from gdpo_megatron.weight_sync.canary import Canary, CanaryResult
from gdpo_megatron.weight_sync.checksum import policy_sums, tensor_sums
from gdpo_megatron.weight_sync.proof import (
    Delivery,
    Finding,
    agree,
    engine_finding,
    found_anywhere,
    replica_findings,
)

if TYPE_CHECKING:  # which needs Megatron
    from gdpo_megatron.policy.model import MegatronModel

_NUM_FIRST = 2
"""Syncs at the start of a run that are checked by all means: the second shows what outlived it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync moved, and what was proven of it.

    Args:
        policy_version: the version that the engine has now.
        num_tensors: Hugging Face tensors.
        num_bytes: of these tensors, whole.
        num_checksums: tensors whose checksum was compared on the way; 0 where none was due.
        num_resident: tensors that the engine gave back and whose checksum was compared.
        canary: what the canary found; None where none was due.
        seconds: of the checks that were due, by name.
    """

    policy_version: int
    num_tensors: int
    num_bytes: int
    num_checksums: int = 0
    num_resident: int = 0
    canary: CanaryResult | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def metrics(self) -> dict[str, float]:
        """As logged by the trainer; those of checks only where they were due."""
        values: dict[str, float] = {"num_bytes": self.num_bytes}
        if self.num_checksums:
            values |= {"num_checksums": self.num_checksums, "num_resident": self.num_resident}
        if self.canary is not None:
            values |= {
                "canary_max_logprob_diff": self.canary.max_logprob_diff,
                "canary_mean_logprob_diff": self.canary.mean_logprob_diff,
                "canary_num_tokens": self.canary.num_tokens,
            }
        values |= {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}
        return {f"weight_sync/{name}": value for name, value in values.items()}


class WeightSync:
    """Brings the policy's weights to the engine of this rank.

    Args:
        config: the `weight_sync` section.
        policy: the trainer's model.
        engine: this rank's engine.
        canary: what is asked of both afterwards; None asks nothing.
        stall: when a call of the engine counts as stalled; not given, never.
    """

    def __init__(
        self,
        config: WeightSyncConfig,
        policy: MegatronModel,
        engine: RolloutEngine,
        canary: Canary | None = None,
        stall: StallLimit | None = None,
    ):
        self._config, self._policy, self._engine = config, policy, engine
        self._canary, self.stall = canary, stall
        self._num_syncs = 0

    def run(self, policy_version: int) -> SyncReport:
        """Wake the engine and give it the policy's weights; collective over all ranks.

        Raises:
            SyncFault: a check failed, or a call of the engine did, on any rank; raised on all. The
                engine is not to be used.
        """
        policy, engine, config = self._policy, self._engine, self._config
        shapes, dtype = hf_shapes(policy.arch), policy.config.params_dtype
        device, seconds = policy.platform.device, dict[str, float]()
        sums = expected = result = None
        findings: list[Finding] = []
        with StallWatch(engine, self.stall, dist.get_rank()) as watch:
            with _call("wake", watch, findings):
                engine.wake()
            if self._due(config.checksum_interval):
                with self._timed("checksum", seconds):
                    sums = tensor_sums(policy, dtype)
                    expected = policy_sums(policy, sums)
                    findings += replica_findings(expected, sums)
            agree(findings, policy_version, device)
            delivery, num_resident = Delivery(shapes, dtype, sums, expected), 0
            tensors = policy.hf_tensors(config.bucket_mb * 2**20)
            delivery.deliver(engine, tensors, policy_version, watch)
            findings = delivery.findings
            if sums is not None and not findings and isinstance(engine, ReadableEngine):
                with (
                    self._timed("resident", seconds),
                    _call("resident_tensors", watch, findings),
                ):
                    held = watch.counted(engine.resident_tensors())
                    num_resident = delivery.look_at_resident(held)
            agree(findings, policy_version, device)
            if self._canary is not None and self._due(config.canary.interval):
                with self._timed("canary", seconds):
                    result = self._asked(self._canary, policy_version, watch)
        self._num_syncs += 1
        return SyncReport(
            policy_version=policy_version,
            num_tensors=delivery.num_tensors,
            num_bytes=delivery.num_bytes,
            num_checksums=0 if sums is None else len(sums),
            num_resident=num_resident,
            canary=result,
            seconds=seconds,
        )

    def release(self) -> None:
        """Let the engine give its memory back until the next sync; collective over all ranks.

        Raises:
            EngineFailure: it failed on any rank; raised on all.
        """
        findings: list[Finding] = []
        with (
            StallWatch(self._engine, self.stall, dist.get_rank()) as watch,
            _call("sleep", watch, findings),
        ):
            self._engine.sleep()
        found = found_anywhere(findings, self._policy.platform.device)
        if found:
            raise EngineFailure([f"after the rollouts, {it.text}" for it in found])

    def _asked(self, canary: Canary, policy_version: int, watch: StallWatch) -> CanaryResult:
        """What the canary says of the weights that are there now."""
        findings: list[Finding] = []
        finished: list[FinishedCompletion] = []
        with _call("the canary", watch, findings):
            finished = canary.complete()
        device = self._policy.platform.device
        agree(findings, policy_version, device)
        result = canary.compare(finished)
        agree(result.findings(canary.tolerance), policy_version, device)
        return result

    def _due(self, interval: int) -> bool:
        number = self._num_syncs
        return interval > 0 and (number < _NUM_FIRST or number % interval == 0)

    @contextmanager
    def _timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        synchronize: Callable[[], None] = self._policy.platform.synchronize
        synchronize()
        began = time.perf_counter()
        yield
        synchronize()
        seconds[name] = time.perf_counter() - began


@contextmanager
def _call(name: str, watch: StallWatch, findings: list[Finding]) -> Iterator[None]:
    """Around a call of the engine: what it raises, or that it hangs, is a finding."""
    try:
        with watch.call(f"no progress of {name}"):
            yield
    except Exception as error:
        findings.append(engine_finding(error, name))
