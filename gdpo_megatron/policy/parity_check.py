"""The FP8 parity check: the same micro-batch with FP8 and without, and what is done about it.

Two passes over the first micro-batch of an update give the log-probs of its completions, and the
gradient of their sum, in FP8 and in params_dtype. That sum always has a gradient; the update's own
loss may have none, or one that is all rounding, where rewards of a group are equal.

The drift between them is logged; above its bound the run stops, or goes on without FP8. The check
leaves nothing behind: weights, optimizer and random state are as they were, and gradients are
zeroed, as they are at the start of every update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.config.fp8 import Fp8Config
from gdpo_megatron.data.batching import MicroBatch
from gdpo_megatron.errors import InputError
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.policy.model import MegatronModel


class Fp8Drift(InputError):
    """FP8 is further from params_dtype than `precision.fp8.parity_check` allows.

    Args:
        problem: a line for the user.
        metrics: of the check.
    """

    def __init__(self, problem: str, metrics: Mapping[str, float]):
        super().__init__(problem)
        self.metrics = dict(metrics)


@dataclass(frozen=True, slots=True)
class Drift:
    """Distance between two ways to compute the same; equal on all ranks.

    Args:
        max_logprob_diff: largest difference of a completion token's log-prob, nats; infinite where
            one of them is not a number.
        grad_cosine: cosine of the angle between the gradients; 1 where both are 0, NaN where one of
            them is not finite.
    """

    max_logprob_diff: float
    grad_cosine: float


class _Likelihood:
    """Minus the completions' log-probs, which are kept."""

    sums = maxima = ()

    def __init__(self) -> None:
        self.logprobs: list[Tensor] = []

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.logprobs.append(logprobs.detach()[batch.loss_mask])
        return -(logprobs * batch.loss_mask).sum(), {}


@contextmanager
def _without_fp8(policy: MegatronPolicy) -> Iterator[None]:
    assert policy.fp8 is not None
    policy.fp8.active = False
    try:
        yield
    finally:
        policy.fp8.active = True


def measure_drift(policy: MegatronPolicy, micro_batch: MicroBatch, *, temperature: float) -> Drift:
    """Compare a micro-batch in FP8 and in params_dtype; collective over the trainer's mesh.

    Args:
        policy: with FP8 active.
        micro_batch: of this data-parallel rank.
        temperature: of the log-probs.
    """
    in_fp8, without = _Likelihood(), _Likelihood()
    gradient = policy.gradients([micro_batch], in_fp8, temperature=temperature)
    with _without_fp8(policy):
        exact = policy.gradients([micro_batch], without, temperature=temperature)
    largest = torch.zeros((), dtype=torch.float64, device=policy.platform.device)
    for a, b in zip(in_fp8.logprobs, without.logprobs, strict=True):
        if len(a):
            largest = torch.maximum(largest, (a.double() - b.double()).abs().max())
    # Not every backend's maximum keeps NaN.
    largest = largest.nan_to_num(nan=math.inf, posinf=math.inf)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    products = torch.zeros(3, dtype=torch.float64, device=policy.platform.device)
    for g, e in zip(gradient, exact, strict=True):
        g, e = g.double(), e.double()
        products += torch.stack([(g * e).sum(), (g * g).sum(), (e * e).sum()])
    dist.all_reduce(products)
    dot, of_fp8, of_exact = products.tolist()
    norms = math.sqrt(of_fp8) * math.sqrt(of_exact)
    cosine = dot / norms if norms else float(of_fp8 == of_exact)
    return Drift(float(largest), cosine)


class ParityGate:
    """The check as a run has it: when it is due, what it allows, what follows.

    Args:
        config: the `precision.fp8` section; None where there is no FP8.
        policy: what is checked.
        reference: what falls back together with it, so that their difference stays that of their
            weights; one that is the policy itself, in other ways, does so anyway.
    """

    def __init__(
        self,
        config: Fp8Config | None,
        policy: MegatronPolicy,
        reference: object = None,
    ):
        self._check = None if config is None else config.parity_check
        self._policy = policy
        models = [policy, reference] if isinstance(reference, MegatronModel) else [policy]
        self._modes = [model.fp8 for model in models if model.fp8 is not None]

    @property
    def active(self) -> bool:
        """Whether the run multiplies in FP8 now."""
        return any(mode.active for mode in self._modes)

    def state_dict(self) -> dict[str, bool]:
        """What a checkpoint keeps: a run that fell back does not return to FP8."""
        return {"fell_back": bool(self._modes) and not self.active}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Take over what `state_dict` of a saved run held; one without FP8 may hold nothing."""
        if state.get("fell_back"):
            self._fall_back()

    def due(self, step: int) -> bool:
        """Whether a step, counted from 0, is checked."""
        return self.active and self._check is not None and step % self._check.every == 0

    def metrics(self) -> dict[str, float]:
        """Of every step of a run that has FP8."""
        return {"fp8/active": float(self.active)} if self._modes else {}

    def check(
        self, micro_batch: MicroBatch, *, temperature: float
    ) -> tuple[dict[str, float], str | None]:
        """Measure and act; collective. Arguments as of `measure_drift`.

        Returns:
            The metrics, and what to tell the user where FP8 has been left, else None.

        Raises:
            Fp8Drift: a bound is passed and `on_failure` is stop.
        """
        check = self._check
        assert check is not None
        drift = measure_drift(self._policy, micro_batch, temperature=temperature)
        metrics = {
            "fp8/max_logprob_diff": drift.max_logprob_diff,
            "fp8/grad_cosine": drift.grad_cosine,
        }
        found: list[str] = []
        # Written so that a value that is no number does not pass.
        if not drift.max_logprob_diff <= check.max_logprob_diff:
            found.append(
                f"a log-prob differs by {drift.max_logprob_diff:.3g} "
                f"(max_logprob_diff {check.max_logprob_diff:g})"
            )
        if not drift.grad_cosine >= check.min_grad_cosine:
            found.append(
                f"the gradients' cosine is {drift.grad_cosine:.4f} "
                f"(min_grad_cosine {check.min_grad_cosine:g})"
            )
        if not found:
            return metrics, None
        message = f"precision.fp8.parity_check: with FP8 and without, {' and '.join(found)}"
        if check.on_failure == "stop":
            raise Fp8Drift(f"{message}; set precision.fp8: null, or wider bounds", metrics)
        self._fall_back()
        return metrics, f"{message}; the run goes on without FP8"

    def _fall_back(self) -> None:
        for mode in self._modes:
            mode.active = False
