"""Updates at the edges, on this rank: bad gradients, no clipping, steps below bfloat16's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rank_layouts import in_layout  # prepares Megatron, so it comes first

import torch  # isort: skip
from gdpo_megatron.certify.layout_models import MAX_LENGTH, TEMPERATURE, make_rollouts
from gdpo_megatron.config.schema import OptimizerConfig, PrecisionConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.data.batching import make_micro_batches
from gdpo_megatron.data.micro_batching import MicroBatching
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.sft import CrossEntropy

CONSTANT = OptimizerConfig(lr=1e-3, max_grad_norm=0.25)


class Policy:
    """A policy of the tied model with one fixed minibatch of sft rows."""

    def __init__(
        self,
        models: str,
        layout: dict[str, Any],
        optimizer: OptimizerConfig = CONSTANT,
        dtype: str = "float32",
    ):
        folder, self.mesh = Path(models) / "tied", layout["mesh"]
        arch = load_architecture(folder)
        self.policy = MegatronPolicy(
            arch,
            optimizer=optimizer,
            total_updates=10,
            make_reader=lambda: HFCheckpoint(folder, arch),
            precision=PrecisionConfig(params_dtype=dtype),
            max_sequence_length=MAX_LENGTH,
            **layout,
        )
        rollouts = make_rollouts()
        samples = range(self.mesh.dp_rank, len(rollouts.completions), self.mesh.dp_size)
        self.batches = make_micro_batches(
            [rollouts.row(s) for s in samples], MicroBatching(micro_batch_size=3)
        )
        self.loss = CrossEntropy(sum(rollouts.lengths))

    def update(self, loss: Any = None) -> dict[str, float]:
        return self.policy.update(self.batches, loss or self.loss, temperature=TEMPERATURE)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.hf_tensors()}


class Broken(CrossEntropy):
    """Becomes `value` on one data-parallel rank."""

    def __init__(self, policy: Policy, value: float):
        super().__init__(sum(make_rollouts().lengths))
        self._factor = value if policy.mesh.dp_rank == policy.mesh.dp_size - 1 else 1.0

    def __call__(self, *args: Any) -> Any:
        loss, stats = super().__call__(*args)
        return loss * self._factor, stats


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edges(models: str, layouts: list[dict[str, Any]]) -> dict[str, Any]:
    """What happened in each layout, and with small steps in the last one."""
    results = []
    for arguments in layouts:
        with in_layout(**arguments) as layout:
            results.append({**_not_finite(models, layout), **_clipping(models, layout)})
            if arguments is layouts[-1]:
                small_steps = _small_steps(models, layout)
    return {"layouts": results, "small_steps": small_steps}


def _not_finite(models: str, layout: dict[str, Any]) -> dict[str, Any]:
    subject, fresh = Policy(models, layout), Policy(models, layout)
    before, messages = subject.weights(), []
    for value in (float("nan"), float("inf")):
        try:
            subject.update(Broken(subject, value))
        except FloatingPointError as error:
            messages.append(str(error))
    untouched = _equal(subject.weights(), before)
    same_stats = subject.update() == fresh.update()
    return {
        "messages": messages,
        "untouched": untouched,
        "goes_on": same_stats and _equal(subject.weights(), fresh.weights()),
    }


def _clipping(models: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Norms with clipping, with none (0), and with a bound that is never reached."""
    policies = {
        bound: Policy(models, layout, OptimizerConfig(lr=1e-3, eps=1.0, max_grad_norm=bound))
        for bound in (0.25, 0.0, 1e9)
    }
    norms = {bound: policy.update()["grad_norm"] for bound, policy in policies.items()}
    weights = {bound: policy.weights() for bound, policy in policies.items()}
    start = Policy(models, layout).weights()

    def moved(bound: float) -> float:
        return sum(float((w - start[n]).double().square().sum()) for n, w in weights[bound].items())

    return {
        "norms": norms,
        "zero_is_unbounded": _equal(weights[0.0], weights[1e9]),
        "clipped_share": (moved(0.25) / moved(0.0)) ** 0.5,
    }


def _small_steps(models: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Share of bfloat16 weights that 1 and 40 updates of 1e-5 each have changed."""
    optimizer = OptimizerConfig(lr=1e-5, weight_decay=0.0)
    subject = Policy(models, layout, optimizer, dtype="bfloat16")
    before, shares = subject.weights(), []
    for updates in (1, 39):
        for _ in range(updates):
            subject.update()
        after = subject.weights()
        changed = sum(int((after[name] != before[name]).sum()) for name in before)
        shares.append(changed / sum(tensor.numel() for tensor in before.values()))
    groups = subject.policy.optimizer.param_groups
    return {
        "changed_shares": shares,
        "main_dtypes": sorted({str(p.dtype) for group in groups for p in group["params"]}),
    }
