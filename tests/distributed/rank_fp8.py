"""FP8 on this rank: products of one layer, updates in a layout, the parity check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from rank_layouts import in_layout  # prepares Megatron, so it comes first

import torch  # isort: skip
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from gdpo_megatron.certify import layout_run
from gdpo_megatron.certify.layout_models import (
    TEMPERATURE,
    make_rollouts,
)
from gdpo_megatron.config.fp8 import Fp8Config
from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.config.memory import MemoryConfig
from gdpo_megatron.config.schema import PrecisionConfig, TrainConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.policy import fp8 as numbers
from gdpo_megatron.policy import fp8_linear
from gdpo_megatron.policy.fp8_linear import (
    Fp8ColumnParallelLinear,
    Fp8Mode,
    Fp8RowParallelLinear,
)
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.policy.parity_check import Fp8Drift, ParityGate
from gdpo_megatron.policy.transformer_config import transformer_config
from gdpo_megatron.update import MinibatchPlan, PolicyLoss, RolloutMicroBatch

# ---- one layer -----------------------------------------------------------------------------------


def products(layouts: list[dict[str, Any]], folder: str, x: Tensor, w: Tensor, dy: Tensor) -> Any:
    """A column- and a row-parallel layer in each layout; what its ranks have is put together.

    Args:
        layouts: arguments of `in_layout`.
        folder: of a model, for Megatron's config.
        x: [s, b, in].
        w: [out, in].
        dy: [s, b, out].
    """
    return [_products(layout, folder, x, w, dy) for layout in layouts]


def _products(layout: dict[str, Any], folder: str, x: Tensor, w: Tensor, dy: Tensor) -> Any:
    found: dict[str, dict[str, Tensor]] = {}
    with in_layout(**layout) as where:
        mesh, sp = where["mesh"], where["parallel"].sequence_parallel
        arch = load_architecture(Path(folder))
        config = transformer_config(
            arch, where["parallel"], PrecisionConfig(), MemoryConfig(), where["platform"]
        )
        mode = Fp8Mode(Fp8Config(backend="scaled_mm"), mesh.tp_cp_group)
        shared: Any = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
        shared |= {"skip_bias_add": False, "fp8": mode, "tp_group": mesh.tp_group}
        out, size = w.shape
        column = Fp8ColumnParallelLinear(size, out, gather_output=False, **shared)
        row = Fp8RowParallelLinear(size, out, input_is_parallel=True, **shared)

        def part(t: Tensor, dim: int | None) -> Tensor:
            t = t if dim is None else t.chunk(mesh.tp_size, dim)[mesh.tp_rank]
            return t.clone().contiguous()

        def whole(t: Tensor, dim: int | None) -> Tensor:
            parts = [torch.empty_like(t) for _ in range(mesh.tp_size)]
            torch.distributed.all_gather(parts, t.contiguous(), group=mesh.tp_group)
            return parts[0] if dim is None else torch.cat(parts, dim)

        tokens = 0 if sp else None
        # How x, W and y are cut.
        for name, layer, cuts in (
            ("column", column, (tokens, 0, 2)),
            ("row", row, (2, 1, tokens)),
        ):
            layer.weight.data.copy_(part(w, cuts[1]))
            own = part(x, cuts[0]).requires_grad_()
            y, bias = layer(own)
            assert bias is None
            y.backward(part(dy, cuts[2]))
            assert own.grad is not None and layer.weight.grad is not None
            found[name] = {
                "y": whole(y.detach(), cuts[2]),
                "dx": whole(own.grad, cuts[0]),
                "dw": whole(layer.weight.grad, cuts[1]),
            }
    return found


# ---- mistakes ------------------------------------------------------------------------------------


def scale_of_each_rank() -> AbstractContextManager[Any]:
    """A rank's own part of a tensor chooses its scale."""
    original = fp8_linear.amaxes
    return mock.patch.object(
        fp8_linear, "amaxes", lambda *tensors, group: original(*tensors, group=None)
    )


def scale_of_one_rank() -> AbstractContextManager[Any]:
    """Tokens in 8 bits are gathered, and then have the scale of the rank that reads them."""
    original = fp8_linear.amaxes

    def apart(*tensors: Tensor, group: Any) -> Tensor:
        return original(*tensors, group=group) * (1.0 + group.rank())

    return mock.patch.object(fp8_linear, "amaxes", apart)


@contextmanager
def sabotaged_scale() -> Iterator[None]:
    """Scales that use a hundred-thousandth of the format's range: nearly all becomes 0."""
    original = numbers.scale_of
    with mock.patch.object(numbers, "scale_of", lambda *args: original(*args) * 1e-5):
        yield


def scale_that_is_no_number() -> AbstractContextManager[Any]:
    return mock.patch.object(numbers, "scale_of", lambda amax, dtype: amax * float("nan"))


MISTAKES: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    None: nullcontext,
    "scale_of_each_rank": scale_of_each_rank,
    "scale_of_one_rank": scale_of_one_rank,
    "sabotaged_scale": sabotaged_scale,
    "scale_that_is_no_number": scale_that_is_no_number,
}


# ---- updates -------------------------------------------------------------------------------------


class _Recorded(PolicyLoss):
    """Keeps the log-probs of completions by sample; made by the caller for one set of updates."""

    plans: list[MinibatchPlan]
    dp_rank: int
    kept: list[dict[int, list[float]]]

    def __init__(self, config: Any, plan: MinibatchPlan, *rest: Any):
        super().__init__(config, plan, *rest)
        self._samples = plan.samples[self.dp_rank]
        self.kept.append({})

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: Any) -> Any:
        for values, mask, row in zip(logprobs, batch.loss_mask, batch.row_ids, strict=True):
            if row >= 0:
                self.kept[-1][self._samples[int(row)]] = values.detach()[mask].tolist()
        return super().__call__(logprobs, entropy, batch)


def updates(
    models: str, cases: list[dict[str, Any]], engine: dict[str, list[list[float]]]
) -> list[dict[str, Any]]:
    """Three updates in each case, rows in micro-batches of their own.

    Args:
        models: folder of the models.
        cases: "model", "layout" (of `in_layout`), "fp8" (of Fp8Config, or None), "dtype" and
            "mistake".
        engine: the engine's log-probs by model and sample.
    """
    results = []
    for case in cases:
        with in_layout(**case["layout"]) as layout, MISTAKES[case["mistake"]]():
            results.append(_case(Path(models), case, layout, engine[case["model"]]))
    return results


def _models(
    folder: Path, case: dict[str, Any], layout: dict[str, Any], **policy: Any
) -> tuple[MegatronPolicy, MegatronModel, list[MinibatchPlan]]:
    fp8 = None if case["fp8"] is None else Fp8Config(**case["fp8"])
    trained, reference = layout_run.make_models(
        folder, case["model"], layout, dtype=case["dtype"], fp8=fp8, **policy
    )
    dp_size, hidden_size = layout["mesh"].dp_size, trained.arch.hidden_size
    return trained, reference, layout_run.make_plans(make_rollouts(), dp_size, hidden_size)


def _case(
    folder: Path, case: dict[str, Any], layout: dict[str, Any], engine: list[list[float]]
) -> dict[str, Any]:
    mesh = layout["mesh"]
    policy, reference, plans = _models(folder, case, layout)
    gradients: list[dict[str, Tensor]] = []
    layout_run.keep_gradients(policy, gradients)
    recorded: Any = type("Recorded", (_Recorded,), {"dp_rank": mesh.dp_rank, "kept": []})
    batching = policy.micro_batching(TrainConfig(micro_batch_size=1))
    with mock.patch.object(layout_run, "PolicyLoss", recorded):
        steps = layout_run.update_policy(
            policy, reference, plans, make_rollouts(), engine, batching, mesh
        )
    weights = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    return {
        "steps": steps,
        "logprobs": recorded.kept[0] if mesh.is_last_stage else {},
        "gradients": gradients if mesh.rank == 0 else [],
        "weights": weights if mesh.rank == 0 else {},
    }


# ---- the parity check ----------------------------------------------------------------------------


def parity(
    models: str, cases: list[dict[str, Any]], engine: dict[str, list[list[float]]]
) -> list[dict[str, Any]]:
    """Updates with a parity gate before each of them.

    Args:
        models: folder of the models.
        cases: as of `updates`, and "checked": how many of the updates the gate looks at first,
            "lora": rank of adapters, or None.
        engine: as of `updates`.
    """
    results = []
    for case in cases:
        with in_layout(**case["layout"]) as layout, MISTAKES[case["mistake"]]():
            results.append(_gated(Path(models), case, layout, engine[case["model"]]))
    return results


def _gated(
    folder: Path, case: dict[str, Any], layout: dict[str, Any], engine: list[list[float]]
) -> dict[str, Any]:
    lora = {} if case["lora"] is None else {"lora": LoraConfig(rank=case["lora"])}
    policy, reference, plans = _models(folder, case, layout, **lora)
    gate = ParityGate(policy.fp8.config if policy.fp8 else None, policy, reference)
    batching = policy.micro_batching(TrainConfig(micro_batch_size=2))
    result: dict[str, Any] = {"metrics": [], "message": None, "stopped": None, "left": []}
    result["start"] = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    update = policy.update

    def checked_update(
        batches: list[RolloutMicroBatch], loss_fn: Any, *, temperature: float
    ) -> dict[str, float]:
        if gate.due(len(result["metrics"])) and len(result["metrics"]) < case["checked"]:
            before = _state()
            metrics, message = gate.check(batches[0], temperature=TEMPERATURE)
            result["left"] += [
                name for name, x in before.items() if not torch.equal(x, _state()[name])
            ]
            result["left"] += [
                "gradient"
                for p in policy.gpt.parameters()
                if p.requires_grad and bool(p.main_grad.any())
            ]
            result["metrics"].append(metrics | gate.metrics())
            result["message"] = message or result["message"]
        return update(batches, loss_fn, temperature=temperature)

    policy.update = checked_update
    try:
        result["steps"] = layout_run.update_policy(
            policy, reference, plans, make_rollouts(), engine, batching, layout["mesh"]
        )
    except Fp8Drift as error:
        result["stopped"], result["metrics"] = error.problems, [error.metrics]
    result["weights"] = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    result["active"] = [gate.active, reference.fp8 is not None and reference.fp8.active]
    result["state"] = gate.state_dict()
    again = ParityGate(policy.fp8.config if policy.fp8 else None, policy, reference)
    again.load_state_dict(result["state"])
    result["resumed_active"] = again.active
    return result


def _state() -> dict[str, Tensor]:
    """The random states of this process."""
    tracked: dict[str, Tensor] = get_cuda_rng_tracker().get_states()
    return {"torch": torch.get_rng_state(), **{k: v.clone() for k, v in tracked.items()}}
