"""LoRA in a layout, on this rank: updates, checkpoints, exports; see test_lora.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from rank_layouts import in_layout, platform  # prepares Megatron, so it comes first

import torch  # isort: skip
from plain_lora import MINIBATCHES, OPTIMIZER  # isort: skip
from gdpo_megatron.certify.layout_models import MAX_LENGTH, make_rollouts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.engines import greedy, request  # isort: skip

from gdpo_megatron.checkpoint import CheckpointManager
from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.config.schema import PrecisionConfig
from gdpo_megatron.config.weight_sync import WeightSyncConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.conversion.hf_writer import write_hf_folder
from gdpo_megatron.conversion.peft_writer import write_peft_folder
from gdpo_megatron.data.batching import MicroBatch, collect_token_values, make_micro_batches
from gdpo_megatron.data.micro_batching import MicroBatching
from gdpo_megatron.data.tokenizer import load_tokenizer
from gdpo_megatron.distributed import mesh as meshes
from gdpo_megatron.policy import lora as lora_module
from gdpo_megatron.policy.lora import Adapter, peft_tensors
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.rollout.base import generate
from gdpo_megatron.rollout.native import NativeEngine
from gdpo_megatron.sft import CrossEntropy
from gdpo_megatron.weight_sync import WeightSync

SEED = 11


class Run:
    """A LoRA policy in a layout."""

    def __init__(self, models: str, case: dict[str, Any], layout: dict[str, Any]):
        self.folder, self.mesh = Path(models) / case["model"], layout["mesh"]
        self.arch = load_architecture(self.folder)
        self.reader = HFCheckpoint(self.folder, self.arch)
        self.lora = LoraConfig(**case["lora"])
        self._layout = {
            **layout,
            "precision": PrecisionConfig(params_dtype=case["dtype"]),
            "max_sequence_length": MAX_LENGTH,
        }
        self.policy = MegatronPolicy(
            self.arch,
            optimizer=OPTIMIZER,
            total_updates=len(MINIBATCHES),
            make_reader=lambda: self.reader,
            lora=self.lora,
            seed=SEED,
            **self._layout,
        )
        self.rollouts, self.step = make_rollouts(), 0

    def base_model(self) -> MegatronModel:
        """The model alone, frozen, as a run without LoRA has it for its reference."""
        model = MegatronModel(self.arch, **self._layout)
        model.load_hf(self.reader)
        model.freeze()
        return model

    def batches(self, samples: tuple[int, ...] | range) -> tuple[list[int], list[MicroBatch]]:
        own = list(samples)[self.mesh.dp_rank :: self.mesh.dp_size]
        rows = [self.rollouts.row(s) for s in own]
        return own, make_micro_batches(rows, MicroBatching(micro_batch_size=2))

    def logprobs(self, model: Any) -> dict[int, list[float]]:
        """Sample -> log-probs of its completion, of this data-parallel rank's samples."""
        own, batches = self.batches(range(len(self.rollouts.completions)))
        values = [v for v in model.logprobs(batches, 1.0) if v is not None]
        if not self.mesh.is_last_stage:
            return {}
        rows = collect_token_values(values, batches, len(own))
        return {s: row.tolist() for s, row in zip(own, rows, strict=True)}

    def train(self, updates: int) -> list[dict[str, float]]:
        steps: list[dict[str, float]] = []
        for samples in MINIBATCHES[self.step : self.step + updates]:
            _, batches = self.batches(samples)
            loss = CrossEntropy(sum(self.rollouts.lengths[s] for s in samples))
            steps.append(self.policy.update(batches, loss, temperature=1.0))
            self.step += 1
        return steps

    def adapters(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in peft_tensors(self.policy)}

    def merged(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.hf_tensors()}

    def own_weights(self) -> dict[str, torch.Tensor]:
        """This rank's part of the model's own weights."""
        return {n: p.detach().clone() for n, p in self.parameters() if ".lora." not in n}

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            (f"{i}.{name}", parameter)
            for i, chunk in enumerate(self.policy.chunks)
            for name, parameter in chunk.named_parameters()
        ]

    def export(self, folder: Path) -> None:
        """What Parts.export writes."""
        tensors, adapters = list(self.merged().items()), list(self.adapters().items())
        if self.mesh.rank == 0:
            write_hf_folder(
                folder / "hf",
                tensors,
                self.arch,
                dtype=torch.float32,
                source=self.folder,
                save_tokenizer=lambda path: None,
            )
            write_peft_folder(folder / "peft", adapters, self.arch, self.lora, base=self.folder)


def run(models: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run cases one after the other.

    Args:
        models: folder of the models.
        cases: each with "model", "layout" (arguments of `in_layout`), "lora" (of LoraConfig),
            "dtype", "mutant", the number of "updates", and where to "export" (None: nowhere).
    """
    results = []
    for case in cases:
        with in_layout(**case["layout"]) as layout, MUTANTS[case["mutant"]]():
            results.append(_case(Run(models, case, layout), case))
    return results


def _engine_and_policy(run: Run) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probs of what an engine over all ranks' own weights says, and the policy's of the same.

    Every rank has an engine of its own, with the same prompts; the policy's are of the last stage.
    """
    engines = meshes.engine_mesh(run.mesh, 1)
    engine = NativeEngine(
        run.arch,
        load_tokenizer(run.folder),
        mesh=engines,
        platform=platform,
        dtype=torch.float32,
        max_sequence_length=MAX_LENGTH,
        max_concurrent_sequences=8,
    )
    WeightSync(WeightSyncConfig(), run.policy, engine).run(1)
    prompts = [prompt.token_ids for prompt in run.rollouts.prompts]
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    done = generate(engine, requests, greedy(12, temperature=1.0))
    said = [it.completion for it in done]
    rows = [(p, list(c.token_ids)) for p, c in zip(prompts, said, strict=True)]
    batches = make_micro_batches(rows, MicroBatching(micro_batch_size=3))
    values = [v for v in run.policy.logprobs(batches, 1.0) if v is not None]
    own = collect_token_values(values, batches, len(rows)) if values else []
    return [list(c.logprobs) for c in said], [row.tolist() for row in own]


def _case(run: Run, case: dict[str, Any]) -> dict[str, Any]:
    base, weights = run.logprobs(run.base_model()), run.own_weights()
    merged = run.merged()
    result: dict[str, Any] = {
        "names": list(merged),
        "changed_at_start": [
            name
            for name, x in merged.items()
            if not torch.equal(x, run.reader.get(name).to(x.dtype))
        ],
        "start_is_base": run.logprobs(run.policy) == base,
        "start": run.adapters(),
        "trainable": sorted(n for n, p in run.parameters() if p.requires_grad),
        "num_optimized": sum(
            p.numel() for group in run.policy.optimizer.param_groups for p in group["params"]
        ),
    }
    result["steps"] = run.train(case["updates"])
    after = run.own_weights()
    result |= {
        "own_weights_moved": [n for n in weights if not torch.equal(weights[n], after[n])],
        "adapters": run.adapters(),
        "logprobs": run.logprobs(run.policy),
        "moved": run.logprobs(run.policy) != base,
        "reference_is_base": run.logprobs(run.policy.without_adapters()) == base,
        "switched_on_again": run.logprobs(run.policy) == run.logprobs(run.policy),
        "changed_at_end": [
            name for name, x in run.merged().items() if not torch.equal(x, merged[name])
        ],
    }
    if case["export"] is not None:
        result["engine"], result["policy"] = _engine_and_policy(run)
        run.export(Path(case["export"]))
    return result


# ---- checkpoints ---------------------------------------------------------------------------------


def save_on_one(models: str, folder: str, case: dict[str, Any]) -> dict[str, Any]:
    """Two updates, save, two more."""
    with in_layout() as layout:
        run = Run(models, case, layout)
        run.train(2)
        CheckpointManager(Path(folder), keep_last=1, mesh=run.mesh).save(2, run.policy, {})
        saved = run.adapters()
        return {"onward": run.train(2), "saved": saved, "adapters": run.adapters()}


def load_elsewhere(
    models: str, folder: str, case: dict[str, Any], layouts: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """In each layout, go on from there for two updates, after one that must be forgotten."""
    results: dict[str, Any] = {}
    for name, arguments in layouts.items():
        with in_layout(**arguments) as layout, mock.patch(f"{__name__}.SEED", SEED + 1):
            run = Run(models, case, layout)
            run.train(1)
            CheckpointManager(Path(folder), keep_last=1, mesh=run.mesh).load_latest(run.policy)
            run.step, loaded = 2, run.adapters()
            results[name] = {
                "loaded": loaded,
                "onward": run.train(2),
                "adapters": run.adapters(),
            }
    return results


# ---- mistakes ------------------------------------------------------------------------------------


def no_reduction_of_columns() -> AbstractContextManager[None]:
    """A of a layer cut by columns learns from this rank's columns only."""
    return mock.patch.object(
        lora_module, "copy_to_tensor_model_parallel_region", lambda x, group: x
    )


def no_reduction_of_rows() -> AbstractContextManager[None]:
    """B of a layer cut by rows sees this rank's part of A x only."""
    return mock.patch.object(
        lora_module, "reduce_from_tensor_model_parallel_region", lambda x, group: x
    )


@contextmanager
def _after_init(change: Callable[[Adapter], None]) -> Iterator[None]:
    original = Adapter.__init__

    def init(self: Adapter, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        change(self)

    with mock.patch.object(Adapter, "__init__", init):
        yield


def copies_count_twice() -> AbstractContextManager[None]:
    """The gradient norm counts what every rank holds on every rank."""

    def mark(adapter: Adapter) -> None:
        adapter.a.tensor_model_parallel = adapter.b.tensor_model_parallel = True

    return _after_init(mark)


def gradients_of_own_tokens() -> AbstractContextManager[None]:
    """Under sequence parallelism, what every rank holds learns from this rank's tokens only."""

    def unmark(adapter: Adapter) -> None:
        adapter.a.sequence_parallel = adapter.b.sequence_parallel = False

    return _after_init(unmark)


def scale_without_rank() -> AbstractContextManager[None]:
    """alpha instead of alpha / rank."""

    def scale(adapter: Adapter) -> None:
        adapter.scale *= adapter.a.shape[0]

    return _after_init(scale)


def start_of_rank() -> AbstractContextManager[None]:
    """Every rank draws its part of A from the beginning of the stream."""
    original = lora_module.a_layout

    class OfRank:
        def __init__(self, layout: Any):
            self.layout = layout

        def shard(self, full: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
            return self.layout.shard(full, 0, tp)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.layout, name)

    return mock.patch.object(lora_module, "a_layout", lambda row: OfRank(original(row)))


MUTANTS: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    None: nullcontext,
    "no_reduction_of_columns": no_reduction_of_columns,
    "no_reduction_of_rows": no_reduction_of_rows,
    "copies_count_twice": copies_count_twice,
    "gradients_of_own_tokens": gradients_of_own_tokens,
    "scale_without_rank": scale_without_rank,
    "start_of_rank": start_of_rank,
}
