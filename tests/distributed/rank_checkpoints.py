"""Runs that save, stop and go on in the same or another layout, on this rank.

The run: linear warmup, then a falling learning rate, so that a schedule that starts again is seen;
minibatches that depend on the step, drawn by the sampler that is saved along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from rank_layouts import in_layout  # prepares Megatron, so it comes first

import torch  # isort: skip
from gdpo_megatron.certify.layout_models import MAX_LENGTH, TinyWeights, make_rollouts
from gdpo_megatron.checkpoint import CheckpointManager, manager
from gdpo_megatron.config.schema import OptimizerConfig, PrecisionConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.data.batching import make_micro_batches
from gdpo_megatron.data.micro_batching import MicroBatching
from gdpo_megatron.data.sampler import PromptSampler
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.sft import CrossEntropy

OPTIMIZER = OptimizerConfig(
    lr=2e-3, min_lr=1e-4, schedule="linear", warmup_steps=2, weight_decay=0.1
)

BFLOAT16 = {"dtype": "bfloat16", "model": "untied"}
EXPERTS = {"model": "experts"}
SAVED: dict[str, dict[str, str]] = {"float32": {}, "bfloat16": BFLOAT16, "experts": EXPERTS}


class Run:
    """A policy in a layout, its sampler and its run folder."""

    def __init__(
        self,
        models: str,
        folder: Path,
        layout: dict[str, Any],
        *,
        distance: float = 0.0,
        keep_last: int = 2,
        dtype: str = "float32",
        model: str = "tied",
    ):
        self.mesh = layout["mesh"]
        arch = load_architecture(Path(models) / model)
        self.policy = MegatronPolicy(
            arch,
            optimizer=OPTIMIZER,
            total_updates=8,
            make_reader=lambda: TinyWeights(arch, distance),
            precision=PrecisionConfig(params_dtype=dtype),
            max_sequence_length=MAX_LENGTH,
            **layout,
        )
        self.rollouts = make_rollouts()
        self.sampler = PromptSampler(len(self.rollouts.completions), 6, seed=3)
        self.checkpoints = CheckpointManager(folder, keep_last=keep_last, mesh=self.mesh)
        self.step = 0

    def train(self, steps: int) -> list[dict[str, Any]]:
        return [self._update() for _ in range(steps)]

    def _update(self) -> dict[str, Any]:
        samples = self.sampler.next_batch()
        own = samples[self.mesh.dp_rank :: self.mesh.dp_size]
        batches = make_micro_batches(
            [self.rollouts.row(s) for s in own], MicroBatching(micro_batch_size=2)
        )
        loss = CrossEntropy(sum(self.rollouts.lengths[s] for s in samples))
        self.step += 1
        stats = self.policy.update(batches, loss, temperature=1.0)
        return {"step": self.step, "samples": samples, **stats}

    def save(self) -> None:
        self.checkpoints.save(self.step, self.policy, {"sampler": self.sampler.state_dict()})

    def load(self) -> None:
        state = self.checkpoints.load_latest(self.policy)
        assert state is not None
        self.step = state["step"]
        self.sampler.load_state_dict(state["sampler"])

    def hf_weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.hf_tensors()}


def _elsewhere(models: str, folder: Path, layout: dict[str, Any], **options: Any) -> Run:
    """A run that starts from other weights and draws other numbers: all it knows is loaded."""
    torch.manual_seed(99)
    run = Run(models, folder, layout, distance=0.5, **options)
    run.train(1)  # its optimizer has a past too
    run.load()
    return run


def save_on_one(models: str, folder: str) -> dict[str, Any]:
    """Train 2 steps, save, train 3; then go on from the file in the same layout.

    Leaves <folder>/float32, /bfloat16 (untied) and /experts for other layouts.
    """
    result: dict[str, Any] = {}
    with in_layout() as layout:
        for name, options in SAVED.items():
            run = Run(models, Path(folder, name), layout, **options)
            torch.manual_seed(7)
            begin = run.train(2)
            run.save()
            saved, noise = run.hf_weights(), torch.rand(5)
            onward = run.train(3)
            again = _elsewhere(models, Path(folder, name), layout, **options)
            loaded = again.hf_weights()
            result[name] = {
                "begin": begin,
                "onward": onward,
                "same_noise": torch.equal(torch.rand(5), noise),
                "same_weights": all(torch.equal(loaded[key], saved[key]) for key in saved),
                "again": again.train(3),
            }
            again.load()
            _share_step_counter(again)
            result[name]["shared_counter"] = again.train(2)
        result["folders"] = _folders(models, Path(folder, "kept"), layout)
    return result


def _share_step_counter(run: Run) -> None:
    """Give all parameters one step counter, which then advances once for each of them."""
    for part in getattr(run.policy.optimizer, "chained_optimizers", [run.policy.optimizer]):
        states = list(part.optimizer.state.values())
        for state in states:
            state["step"] = states[0]["step"]


def _folders(models: str, folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """What is in the checkpoint folder while saves succeed and fail."""

    def names() -> list[str]:
        return sorted(path.name for path in (folder / "checkpoints").iterdir())

    run = Run(models, folder, layout, keep_last=2)
    seen: dict[str, Any] = {"none": run.checkpoints.load_latest(run.policy) is None}
    run.train(1)
    run.save()
    run.train(1)

    def break_off(state: Any, path: str) -> None:
        Path(path, "half.distcp").write_bytes(b"half")
        raise OSError("no space left on device")

    with mock.patch.object(manager.dist_checkpointing, "save", break_off):
        try:
            run.save()
        except OSError as error:
            seen["error"] = str(error)
    seen["broken_off"] = names(), run.checkpoints.steps()
    (folder / "checkpoints" / "step_00000009.partial").mkdir()
    (folder / "checkpoints" / "notes").mkdir()
    resumed = Run(models, folder, layout)
    resumed.load()
    seen["resumed_at"] = resumed.step
    run.save()
    run.train(1)
    run.save()
    seen["end"] = names(), run.checkpoints.steps()
    return seen


def load_on_more(
    models: str,
    folder: str,
    layouts: dict[str, dict[str, int]],
    through: str,
    experts: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Go on from what `save_on_one` saved, in each layout, and with experts in each of `experts`.

    In the layout called `through` the run is saved once more after a step; the others then also go
    on from there. With experts that is done in every layout, and each goes on in the one after it.
    """
    result: dict[str, Any] = {}
    for name, sizes in experts.items():
        with in_layout(**sizes) as layout:
            run = _elsewhere(models, Path(folder, "experts"), layout, **EXPERTS)
            result[name] = {"onward": run.train(2)}
            run.load()
            run.train(1)
            run.checkpoints = CheckpointManager(Path(folder, name), keep_last=1, mesh=run.mesh)
            run.save()
    for saver, name in zip(experts, [*list(experts)[1:], *experts], strict=False):
        with in_layout(**experts[name]) as layout:
            again = _elsewhere(models, Path(folder, saver), layout, **EXPERTS)
            result[name]["from_second"] = again.train(2)
    for name in sorted(layouts, key=lambda name: name != through):
        with in_layout(**layouts[name]) as layout:
            run = _elsewhere(models, Path(folder, "float32"), layout)
            result[name] = {"onward": run.train(2)}
            run = _elsewhere(
                models, Path(folder, "bfloat16"), layout, dtype="bfloat16", model="untied"
            )
            result[name]["bfloat16"] = run.train(2)
            second = Path(folder, f"through_{through}")
            if name == through:
                run = _elsewhere(models, Path(folder, "float32"), layout)
                run.train(1)
                run.checkpoints = CheckpointManager(second, keep_last=1, mesh=run.mesh)
                run.save()
            else:
                result[name]["from_second"] = _elsewhere(models, second, layout).train(2)
    return result
