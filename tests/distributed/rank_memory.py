"""Updates with and without the keys of `memory`, side by side on this rank; see test_memory.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from rank_layouts import in_layout  # prepares Megatron, so it comes first

import torch  # isort: skip
from gdpo_megatron.certify.layout_models import MAX_LENGTH, OPTIMIZER, TEMPERATURE, make_rollouts

from torch import Tensor  # isort: skip

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.peak_memory import peak_bytes  # isort: skip

from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel

from gdpo_megatron.checkpoint import CheckpointManager
from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.config.memory import MemoryConfig
from gdpo_megatron.config.schema import MicroBatchConfig, PrecisionConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint, RandomWeights
from gdpo_megatron.data.batching import MicroBatch, make_micro_batches
from gdpo_megatron.policy import head, logprobs
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.policy.swapped import SwappedReference

NUM_UPDATES = 2
ROWS = ((0, 1, 2, 3, 4), (6, 8, 9))
"""Samples of each update; with two data-parallel ranks, uneven."""


class Objective:
    """Log-probs and entropies with weights of their own, so that no token's gradient is another's.

    Args:
        with_entropy: whether the entropy is part of the loss.
    """

    sums = ("loss", "entropy")
    maxima = ()

    def __init__(self, with_entropy: bool):
        self._with_entropy = with_entropy

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.cos(torch.arange(logprobs.numel()).view_as(logprobs) + batch.labels)
        loss = -(weights * batch.loss_mask * logprobs).sum() / 50
        if self._with_entropy:
            loss = loss - (weights * batch.loss_mask * entropy).sum() / 70
        return loss, {
            "loss": loss.detach(),
            "entropy": (entropy * batch.loss_mask).sum().detach(),
        }


class Run:
    """A policy in a layout.

    Args:
        models: folder of the models.
        case: "model", "dtype", "memory" and, where they are wanted, "lora" and "packing".
        layout: of `in_layout`.
    """

    def __init__(self, models: str, case: dict[str, Any], layout: dict[str, Any]):
        self.folder, self.mesh = Path(models), layout["mesh"]
        self.arch = load_architecture(self.folder / case["model"])
        self.kwargs: dict[str, Any] = {
            **layout,
            "precision": PrecisionConfig(params_dtype=case.get("dtype", "float32")),
            "max_sequence_length": MAX_LENGTH,
            "memory": MemoryConfig(**case.get("memory", {})),
            "packing": case.get("packing", False),
        }
        self.reader = HFCheckpoint(self.folder / case["model"], self.arch)
        lora = LoraConfig(rank=4) if case.get("lora") else None
        self.policy = MegatronPolicy(
            self.arch,
            optimizer=OPTIMIZER,
            total_updates=NUM_UPDATES,
            make_reader=lambda: self.reader,
            lora=lora,
            **self.kwargs,
        )
        self.objective = Objective(case.get("entropy", True))
        self.gradients: list[dict[str, Tensor]] = []
        self._keep_gradients()

    def _keep_gradients(self) -> None:
        """Note what the optimizer is about to be given on this rank."""
        finalize: Any = self.policy.config.finalize_model_grads_func

        def wrapped(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            self.gradients.append(
                {
                    f"{i}.{name}": _main_grad(parameter).clone()
                    for i, chunk in enumerate(self.policy.chunks)
                    for name, parameter in chunk.named_parameters()
                    if parameter.requires_grad
                }
            )

        self.policy.config.finalize_model_grads_func = wrapped

    def batches(self, samples: tuple[int, ...]) -> list[MicroBatch]:
        rollouts = make_rollouts()
        rows = [rollouts.row(s) for s in samples]
        own = list(range(len(rows)))[self.mesh.dp_rank :: self.mesh.dp_size]
        batching = self.policy.micro_batching(MicroBatchConfig(micro_batch_size=2))
        lengths = [len(prompt) + len(completion) for prompt, completion in rows]
        peers = [lengths[rank :: self.mesh.dp_size] for rank in range(self.mesh.dp_size)]
        return make_micro_batches([rows[i] for i in own], batching, peers=peers)

    def logprobs(self, model: Any = None) -> list[Tensor]:
        batches = self.batches(tuple(range(10)))
        values = (model or self.policy).logprobs(batches, TEMPERATURE)
        return [x.clone() for x in values if x is not None]

    def update(self, number: int) -> dict[str, float]:
        batches = self.batches(ROWS[number])
        return self.policy.update(batches, self.objective, temperature=TEMPERATURE)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.hf_tensors()}

    def result(self) -> dict[str, Any]:
        before = self.logprobs()
        steps = [self.update(number) for number in range(NUM_UPDATES)]
        return {
            "logprobs": before,
            "steps": steps,
            "gradients": self.gradients,
            "weights": self.weights(),
            "logprobs_after": self.logprobs(),
        }


def _main_grad(parameter: Any) -> Tensor:
    return parameter.main_grad


def compare(models: str, layouts: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Run the variants of each layout.

    Args:
        models: folder of the models.
        layouts: each with "layout" (of `in_layout`), "model" and "variants", a name -> case.

    Returns:
        For each layout, the results of its variants, on this rank.
    """
    results = []
    for entry in layouts:
        with in_layout(**entry["layout"]) as layout:
            results.append({})
            for name, case in entry["variants"].items():
                with MUTANTS[case.get("mutant")]():
                    run = Run(models, {"model": entry["model"], **case}, layout)
                    results[-1][name] = run.result()
    return results


# ---- between updates -----------------------------------------------------------------------------


def references(models: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The swapped reference against one in a model of its own, before and after an update."""
    results = []
    for case in layouts:
        with in_layout(**case["layout"]) as layout, MUTANTS[case.get("mutant")]():
            results.append(_reference(Run(models, case, layout), Run(models, case, layout)))
    return results


def _reference(run: Run, undisturbed: Run) -> dict[str, Any]:
    separate = MegatronModel(run.arch, **run.kwargs)
    separate.load_hf(run.reader)
    separate.freeze()
    swapped = SwappedReference(run.policy)
    result: dict[str, Any] = {"separate": run.logprobs(separate), "start": run.logprobs(swapped)}
    result["num_bytes"] = swapped.num_bytes
    result["buffer_bytes"] = sum(b.param_data.nbytes for b in _buffers(run.policy))
    undisturbed.update(0)
    run.update(0)
    result["after_update"] = run.logprobs(swapped)
    result["policy"], result["right_policy"] = run.logprobs(), undisturbed.logprobs()
    undisturbed.update(1)
    run.update(1)
    result["weights"], result["right_weights"] = run.weights(), undisturbed.weights()
    return result


def _buffers(policy: MegatronPolicy) -> list[Any]:
    chunks: list[Any] = policy.ddp
    return [b for ddp in chunks for b in [*ddp.buffers, *ddp.expert_parallel_buffers]]


def freed(models: str, folder: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Updates with the gradients' buffers freed between them, saved and loaded meanwhile."""
    results = []
    for number, case in enumerate(layouts):
        with in_layout(**case["layout"]) as layout, MUTANTS[case.get("mutant")]():
            runs = [Run(models, case, layout) for _ in range(3)]
            results.append(_freed(Path(folder) / str(number), *runs))
    return results


def _freed(folder: Path, plain: Run, run: Run, resumed: Run) -> dict[str, Any]:
    def sizes() -> int:
        return sum(b.grad_data.untyped_storage().nbytes() for b in _buffers(run.policy))

    whole, held = sizes(), []
    run.policy.free_grad_buffers()
    for number in range(NUM_UPDATES):
        held.append(sizes())
        plain.update(number)
        run.update(number)
        held.append(sizes())
        for _ in range(2):  # the second one changes nothing
            run.policy.free_grad_buffers()
        run.logprobs()
    checkpoints = CheckpointManager(folder, keep_last=1, mesh=run.mesh)
    checkpoints.save(1, run.policy, {})
    resumed.policy.free_grad_buffers()
    checkpoints.load_latest(resumed.policy)
    result = {
        "whole": whole,
        "held": held,
        "gradients": list(run.gradients),
        "right_gradients": list(plain.gradients),
        "weights": run.weights(),
        "right_weights": plain.weights(),
    }
    plain.update(0)
    resumed.update(0)
    return result | {"resumed": resumed.weights(), "went_on": plain.weights()}


# ---- peak memory ---------------------------------------------------------------------------------


def peaks(
    config: str,
    sizes: dict[str, int],
    cases: dict[str, dict[str, Any]],
    layout: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Largest sum of live tensors in one update beyond what the policy holds, in bytes.

    Args:
        config: folder with the config.json of the model.
        sizes: "rows" and "tokens" of the one micro-batch.
        cases: name -> the `memory` section.
        layout: of `in_layout`, or "packing".
    """
    options = dict(layout or {})
    packing = options.pop("packing", False)
    results: dict[str, int] = {}
    generator = torch.Generator().manual_seed(3)
    with in_layout(**options) as where:
        arch = load_architecture(Path(config))
        rows = torch.randint(
            0, arch.vocab_size, (sizes["rows"], sizes["tokens"]), generator=generator
        )
        for name, memory in cases.items():
            policy = MegatronPolicy(
                arch,
                optimizer=OPTIMIZER,
                total_updates=1,
                make_reader=lambda: RandomWeights(arch, 1),
                **where,
                precision=PrecisionConfig(),
                max_sequence_length=sizes["tokens"],
                packing=packing,
                memory=MemoryConfig(**memory),
            )
            batches = make_micro_batches(
                [(row[:1].tolist(), row[1:].tolist()) for row in rows],
                policy.micro_batching(MicroBatchConfig(micro_batch_size=len(rows))),
            )
            # Without the optimizer's own memory, which is the same for all.
            with mock.patch.object(policy.optimizer, "step_with_ready_grads"):
                results[name] = peak_bytes(
                    lambda p=policy, b=batches: p.update(b, Objective(True), temperature=1.0)
                )
            del policy
    return results


# ---- mistakes ------------------------------------------------------------------------------------


def last_chunk_without_weight_gradient() -> AbstractContextManager[Any]:
    """The output layer learns nothing from the last chunk of tokens."""
    original = logprobs._Softmax.backward

    def backward(self: Any, logits: Tensor, *rest: Any) -> Tensor:
        grad = original(self, logits, *rest)
        return grad if len(grad) == 7 else torch.zeros_like(grad)

    return mock.patch.object(logprobs._Softmax, "backward", backward)


def hidden_gradient_of_one_rank() -> AbstractContextManager[Any]:
    """The hidden states' gradient is not summed over tensor-parallel ranks."""
    return mock.patch.object(
        head, "copy_to_tensor_model_parallel_region", lambda hidden, group: hidden
    )


def hidden_gradient_scattered() -> AbstractContextManager[Any]:
    """Under sequence parallelism a rank takes its part of its own gradient, not of the sum."""

    def gather(hidden: Tensor, group: Any) -> Tensor:
        return tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=group
        )

    return mock.patch.object(head, "gather_from_sequence_parallel_region", gather)


def no_gradient_asked() -> AbstractContextManager[Any]:
    """What is recomputed under a frozen embedding has no input with a gradient."""
    return mock.patch.object(MegatronPolicy, "_ask_for_gradients", lambda self: None)


def other_inputs_recomputed() -> AbstractContextManager[Any]:
    """What is recomputed is not what was computed."""
    original = tensor_parallel.random.CheckpointFunction.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        run = ctx.run_function
        ctx.run_function = lambda *args: run(*(1.01 * a if _is_float(a) else a for a in args))
        return original(ctx, *grads)

    return mock.patch.object(
        tensor_parallel.random.CheckpointFunction, "backward", staticmethod(backward)
    )


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def parts_not_gathered() -> AbstractContextManager[Any]:
    """A rank exchanges its part and never sees the others'."""
    return mock.patch.object(SwappedReference, "_gather", lambda self: None)


def buffers_stay() -> AbstractContextManager[Any]:
    """Nothing is given back."""
    return mock.patch.object(DistributedDataParallel, "offload_grad_buffers", lambda self: None)


MUTANTS: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    None: nullcontext,
    "last_chunk_without_weight_gradient": last_chunk_without_weight_gradient,
    "hidden_gradient_of_one_rank": hidden_gradient_of_one_rank,
    "hidden_gradient_scattered": hidden_gradient_scattered,
    "no_gradient_asked": no_gradient_asked,
    "other_inputs_recomputed": other_inputs_recomputed,
    "parts_not_gathered": parts_not_gathered,
    "buffers_stay": buffers_stay,
}
