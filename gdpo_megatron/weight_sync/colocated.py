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

from gdpo_megatron.config.weight_sync import WeightSyncConfig
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.rollout.base import ReadableEngine, RolloutEngine
from gdpo_megatron.weight_sync.canary import Canary, CanaryResult
from gdpo_megatron.weight_sync.checksum import policy_sums, tensor_sums
from gdpo_megatron.weight_sync.proof import Delivery, Finding, agree, replica_findings

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
    """

    def __init__(
        self,
        config: WeightSyncConfig,
        policy: MegatronModel,
        engine: RolloutEngine,
        canary: Canary | None = None,
    ):
        self._config, self._policy, self._engine = config, policy, engine
        self._canary = canary
        self._num_syncs = 0

    def run(self, policy_version: int) -> SyncReport:
        """Give the engine, which is awake, the policy's weights; collective over all ranks.

        Raises:
            SyncFault: a check failed, on any rank; raised on all. The engine is not to be used.
        """
        policy, engine, config = self._policy, self._engine, self._config
        shapes, dtype = hf_shapes(policy.arch), policy.config.params_dtype
        device, seconds = policy.platform.device, dict[str, float]()
        sums = expected = None
        findings: list[Finding] = []
        if self._due(config.checksum_interval):
            with self._timed("checksum", seconds):
                sums = tensor_sums(policy, dtype)
                expected = policy_sums(policy, sums)
                findings += replica_findings(expected, sums)
            agree(findings, policy_version, device)
        delivery, num_resident = Delivery(shapes, dtype, sums, expected), 0
        delivery.deliver(engine, policy.hf_tensors(config.bucket_mb * 2**20), policy_version)
        if sums is not None and not delivery.findings and isinstance(engine, ReadableEngine):
            with self._timed("resident", seconds):
                num_resident = delivery.look_at_resident(engine.resident_tensors())
        agree(delivery.findings, policy_version, device)
        result = None
        if self._canary is not None and self._due(config.canary.interval):
            with self._timed("canary", seconds):
                result = self._canary.run()
            agree(result.findings(self._canary.tolerance), policy_version, device)
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
