"""The canary: fixed prompts, completed right after a sync, and what the policy says of the same.

Checksums prove the tensors; this proves what the engine makes of them. Every engine completes the
same prompts with the same noise each time, on purpose: a prefix cache that outlived a sync still
has them. The policy then computes the log-probs of these completions, each on one data-parallel
rank, and the two must agree as far as their arithmetic allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.config.weight_sync import CanaryConfig
from gdpo_megatron.data.batching import MicroBatch, make_micro_batches, place_token_values
from gdpo_megatron.data.micro_batching import MicroBatching
from gdpo_megatron.distributed.exchange import exchange_tokens, gather_by_sample
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.rollout.base import (
    FinishedCompletion,
    RolloutEngine,
    RolloutRequest,
    SamplingParams,
    generate,
    noise_key,
)
from gdpo_megatron.types import Prompt
from gdpo_megatron.weight_sync.proof import Finding

if TYPE_CHECKING:  # which needs Megatron
    from gdpo_megatron.policy.model import MegatronModel


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds of the difference between two computations of a token's log-prob, nats.

    Args:
        largest: of any token.
        mean: of the absolute differences over all tokens.
    """

    largest: float
    mean: float


TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(1e-4, 2e-5),
    "bfloat16": Tolerance(0.5, 0.05),
    "fp8": Tolerance(1.5, 0.15),
}
"""By the engine's number format. Measured: engines on CPU in float32 at most 6e-6; in bfloat16 at
most 0.06, mean 0.014, on small models; FP8 has not been measured."""


def tolerance_of(config: CanaryConfig, number_format: str) -> Tolerance:
    """What the section says, else what TOLERANCES has for the engine's number format."""
    usual = TOLERANCES[number_format]
    return Tolerance(
        config.max_logprob_diff or usual.largest, config.mean_logprob_diff or usual.mean
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryResult:
    """What a canary found; equal on all ranks.

    Args:
        max_logprob_diff: largest absolute difference; infinite where one side is not a number.
        mean_logprob_diff: over all tokens.
        num_tokens: compared, over all engines.
        worst: where the largest one is.
    """

    max_logprob_diff: float
    mean_logprob_diff: float
    num_tokens: int
    worst: str

    def findings(self, tolerance: Tolerance) -> list[Finding]:
        """What is beyond the tolerance."""
        # Written so that a value that is no number does not pass.
        if self.max_logprob_diff <= tolerance.largest and self.mean_logprob_diff <= tolerance.mean:
            return []
        text = (
            f"the log-probs of {self.num_tokens} tokens by engine and policy differ by at most "
            f"{self.max_logprob_diff:.3g} (weight_sync.canary.max_logprob_diff "
            f"{tolerance.largest:g}), mean {self.mean_logprob_diff:.3g} (mean_logprob_diff "
            f"{tolerance.mean:g}); worst: {self.worst}. tools/compare_engine.py finds the first "
            "layer that differs"
        )
        return [Finding("canary", text)]


class Canary:
    """Asks engine and policy about the same tokens.

    Args:
        config: the `weight_sync.canary` section.
        prompts: of data.train.
        policy: the trainer's model.
        engine: this rank's engine.
        engines: its mesh.
        batching: how rows become micro-batches of the policy.
        temperature: of the run's rollouts.
        max_sequence_length: prompt and completion together; longer prompts are cut.
        seed: of the sampling noise.
        tolerance: see tolerance_of.
    """

    def __init__(
        self,
        config: CanaryConfig,
        prompts: Sequence[Prompt],
        *,
        policy: MegatronModel,
        engine: RolloutEngine,
        engines: EngineMesh,
        batching: MicroBatching,
        temperature: float,
        max_sequence_length: int,
        seed: int,
        tolerance: Tolerance,
    ):
        self.tolerance = tolerance
        self._policy, self._engine, self._engines = policy, engine, engines
        self._batching, self._temperature = batching, temperature
        room = max_sequence_length - config.num_tokens
        self._prompts = [(p.prompt_id, p.token_ids[:room]) for p in prompts[: config.num_prompts]]
        self._sampling = SamplingParams.unrestricted(config.num_tokens, temperature)
        self._requests = [
            RolloutRequest(
                request_id=i,
                prompt_token_ids=token_ids,
                noise_key=noise_key(seed, "canary", 0, i, 0),
            )
            for i, (_, token_ids) in enumerate(self._prompts)
        ]

    def complete(self) -> list[FinishedCompletion]:
        """What this rank's engine, which has the policy's weights, makes of the prompts."""
        return generate(self._engine, self._requests, self._sampling)

    def compare(self, finished: Sequence[FinishedCompletion]) -> CanaryResult:
        """Lay what every engine has completed beside the policy; collective over all ranks."""
        mesh, number = self._policy.mesh, len(self._prompts)
        # Sample r * number + i is prompt i, completed by engine replica r.
        first = self._engines.replica * number
        own = {}
        if self._engines.tp_rank == 0:
            own = {first + i: it.completion for i, it in enumerate(finished)}
        num_samples = self._engines.num_replicas * number
        device = self._policy.platform.device
        counts = torch.tensor([len(own[s].token_ids) for s in own], dtype=torch.int64)
        lengths = gather_by_sample(list(own), counts, num_samples, device).tolist()
        dp_rank_of = [sample % mesh.dp_size for sample in range(num_samples)]
        tokens = exchange_tokens(
            {s: (it.token_ids, it.logprobs, [True] * len(it.token_ids)) for s, it in own.items()},
            lengths=lengths,
            replica_of=[sample // number for sample in range(num_samples)],
            dp_rank_of=dp_rank_of,
            mesh=mesh,
            engines=self._engines,
            device=device,
        )
        samples = sorted(tokens)
        rows = [(self._prompts[s % number][1], tokens[s][0]) for s in samples]
        sizes = [len(self._prompts[s % number][1]) + lengths[s] for s in range(num_samples)]
        peers = [sizes[rank :: mesh.dp_size] for rank in range(mesh.dp_size)]
        batches = make_micro_batches(rows, self._batching, peers=peers)
        with _in_params_dtype(self._policy):
            policy = self._policy.logprobs(batches, self._temperature)
        differences = torch.zeros(num_samples, max(lengths), dtype=torch.float64)
        if mesh.is_last_stage and mesh.tp_rank == mesh.cp_rank == 0:
            engine = [tokens[s][1] for s in samples]
            for batch, logprobs in zip(batches, policy, strict=True):
                assert logprobs is not None
                _place(differences, batch, logprobs.cpu(), engine, samples)
        return self._summary(differences.to(device), sum(lengths))

    def _summary(self, differences: Tensor, num_tokens: int) -> CanaryResult:
        dist.all_reduce(differences)  # each sample is on one rank
        differences = differences.cpu()
        largest = float(differences.max())
        sample, position = divmod(int(differences.argmax()), differences.shape[1])
        replica, prompt = divmod(sample, len(self._prompts))
        return CanaryResult(
            max_logprob_diff=largest,
            mean_logprob_diff=float(differences.sum()) / num_tokens,
            num_tokens=num_tokens,
            worst=f"prompt '{self._prompts[prompt][0]}', completion token {position}, "
            f"engine {replica}",
        )


@contextmanager
def _in_params_dtype(policy: MegatronModel) -> Iterator[None]:
    """Within, the policy multiplies without FP8: the question is what its weights are."""
    mode = policy.fp8 if policy.fp8 is not None and policy.fp8.active else None
    if mode is not None:
        mode.active = False
    try:
        yield
    finally:
        if mode is not None:
            mode.active = True


def _place(
    differences: Tensor,
    batch: MicroBatch,
    logprobs: Tensor,
    engine: Sequence[Sequence[float]],
    samples: Sequence[int],
) -> None:
    """Write |policy - engine| of a micro-batch's tokens to [samples, tokens]."""
    apart = (logprobs.double() - place_token_values(engine, batch, torch.float64)).abs()
    apart = apart.nan_to_num(nan=math.inf, posinf=math.inf)
    for slot, row in enumerate(batch.row_ids.tolist()):
        if row >= 0:
            values = apart[slot, batch.loss_mask[slot]]
            differences[samples[row], : len(values)] = values
