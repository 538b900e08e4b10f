"""Import, log-probs, three updates and export of a tiny model in a layout, on this rank."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gdpo_megatron.platform import Platform, detect_platform

platform: Platform = detect_platform()
platform.prepare_megatron()

import rank_mutants  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from tiny_llama import (  # noqa: E402
    GROUP_SIZE,
    LOSS,
    MAX_LENGTH,
    MICRO_BATCH_SIZE,
    NUM_MINIBATCHES,
    OPTIMIZER,
    TEMPERATURE,
    Rollouts,
    make_rollouts,
)
from torch import Tensor  # noqa: E402

from gdpo_megatron.config.schema import ParallelConfig, PrecisionConfig, TrainConfig  # noqa: E402
from gdpo_megatron.conversion.families import load_architecture  # noqa: E402
from gdpo_megatron.conversion.hf_io import HFCheckpoint  # noqa: E402
from gdpo_megatron.data.batching import (  # noqa: E402
    collect_token_values,
    make_micro_batches,
    place_token_values,
)
from gdpo_megatron.data.micro_batching import MicroBatching  # noqa: E402
from gdpo_megatron.distributed import mesh as meshes  # noqa: E402
from gdpo_megatron.distributed.mesh import Mesh  # noqa: E402
from gdpo_megatron.policy import weights as policy_weights  # noqa: E402
from gdpo_megatron.policy.megatron_policy import MegatronPolicy  # noqa: E402
from gdpo_megatron.policy.model import MegatronModel  # noqa: E402
from gdpo_megatron.update import (  # noqa: E402
    MinibatchPlan,
    PolicyLoss,
    RolloutMicroBatch,
    plan_minibatches,
    rollout_micro_batches,
)


@contextmanager
def in_layout(
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    vp: int = 1,
    ep: int = 1,
    etp: int = 1,
    sp: bool = False,
    overlap: bool = False,
    stages: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The constructor arguments of a model in a layout; several can follow each other."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=sp,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        pipeline_model_parallel_layout=stages,
    )
    mesh = meshes.initialize(parallel, platform)
    yield {"parallel": parallel, "mesh": mesh, "platform": platform}
    parallel_state.destroy_model_parallel()
    gc.collect()


def run(models: str, cases: list[dict[str, Any]], engine: list[Any]) -> list[dict[str, Any]]:
    """Run cases one after the other.

    Args:
        models: folder of the models.
        cases: each with "model", "layout" (arguments of `in_layout`), "dtype", "mutant" and the
            number of "updates"; "batching" are keys of `train` where they are not the usual ones.
        engine: for each model, the log-probs that the engine is said to have had, by sample.
    """
    results = []
    for case in cases:
        with in_layout(**case["layout"]) as layout, rank_mutants.MUTANTS[case["mutant"]]():
            results.append(_case(Path(models), case, layout, engine[case["model"]]))
    return results


def _case(
    folder: Path, case: dict[str, Any], layout: dict[str, Any], engine: list[list[float]]
) -> dict[str, Any]:
    mesh, rollouts = layout["mesh"], make_rollouts()
    arch = load_architecture(folder / case["model"])
    layout = {
        **layout,
        "precision": PrecisionConfig(params_dtype=case["dtype"]),
        "max_sequence_length": MAX_LENGTH,
    }
    train = TrainConfig(**{"micro_batch_size": MICRO_BATCH_SIZE, **case.get("batching", {})})
    layout["packing"] = train.packing
    reader = HFCheckpoint(folder / case["model"], arch)
    policy = MegatronPolicy(
        arch, optimizer=OPTIMIZER, total_updates=3, make_reader=lambda: reader, **layout
    )
    reference = MegatronModel(arch, **layout)
    reference.load_hf(HFCheckpoint(folder / f"{case['model']}_reference", arch))
    reference.freeze()
    exported = [(name, tensor.clone()) for name, tensor in policy.hf_tensors()]
    gradients: list[dict[str, Tensor]] = []
    _keep_gradients(policy, gradients)
    batching = policy.micro_batching(train)
    plans = plan_minibatches(
        rollouts.loss_rows,
        [len(prompt.token_ids) for prompt in rollouts.prompts],
        rollouts.lengths,
        group_size=GROUP_SIZE,
        num_minibatches=NUM_MINIBATCHES,
        dp_size=mesh.dp_size,
        hidden_size=arch.hidden_size,
    )
    result: dict[str, Any] = {
        "names": [name for name, _ in exported],
        "changed": [
            name for name, x in exported if not torch.equal(x, reader.get(name).to(x.dtype))
        ],
        "logprobs": _logprobs(policy, rollouts, batching, mesh),
        "rows_of_ranks": [[len(ids) for ids in plan.samples] for plan in plans],
    }
    result["steps"] = _updates(
        policy, reference, plans[: case["updates"]], rollouts, engine, batching, mesh
    )
    result["padding"] = [step.pop("padding_share") for step in result["steps"]]
    result["logprobs_after"] = _logprobs(policy, rollouts, batching, mesh)
    weights = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    result["weights"] = weights if mesh.rank == 0 else {}
    result["gradients"] = gradients if mesh.rank == 0 else []
    return result


def _keep_gradients(policy: MegatronPolicy, kept: list[dict[str, Tensor]]) -> None:
    """Note the reduced gradients of each update, whole and under Hugging Face names."""
    finalize: Any = policy.config.finalize_model_grads_func

    def wrapped(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        for ddp in policy.ddp:
            for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]:
                for bucket in buffer.buckets:
                    _gather_shards(bucket.grad_data, buffer.data_parallel_group)
        own = {row.hf: p for row, p in policy.stage_rows if not row.import_only}
        kept.append({})
        for row in policy_weights.mapping_rows(policy.arch):  # as a mistake may have it
            if not row.import_only:
                shard = own[row.hf].main_grad.clone() if row.hf in own else None
                whole = policy.whole_tensors(row, row.layout, shard, row.shapes)
                kept[-1] |= {n: x.clone() for n, x in zip(row.hf, whole, strict=True)}

    policy.config.finalize_model_grads_func = wrapped


def _gather_shards(gradients: Tensor, group: Any) -> None:
    """Each data-parallel rank has reduced a part: bring the parts together."""
    if group.size() > 1:
        own = gradients.chunk(group.size())[group.rank()].clone()
        dist.all_gather_into_tensor(gradients, own, group=group)


def _logprobs(
    policy: MegatronModel, rollouts: Rollouts, batching: MicroBatching, mesh: Mesh
) -> dict[int, list[float]]:
    """Sample -> log-probs of its completion, of this data-parallel rank's samples."""
    rows = [rollouts.row(s) for s in range(len(rollouts.completions))]
    samples = list(range(len(rows)))[mesh.dp_rank :: mesh.dp_size]
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    peers = [lengths[rank :: mesh.dp_size] for rank in range(mesh.dp_size)]
    batches = make_micro_batches([rows[s] for s in samples], batching, peers=peers)
    values = [v for v in policy.logprobs(batches, TEMPERATURE) if v is not None]
    if not mesh.is_last_stage:
        assert not values
        return {}
    by_row = collect_token_values(values, batches, len(samples))
    return {s: row.tolist() for s, row in zip(samples, by_row, strict=True)}


def _updates(
    policy: MegatronPolicy,
    reference: MegatronModel,
    plans: list[MinibatchPlan],
    rollouts: Rollouts,
    engine: list[list[float]],
    batching: MicroBatching,
    mesh: Mesh,
) -> list[dict[str, float]]:
    """One optimizer step per minibatch, the way the trainer does it."""
    tokens = {s: (ids, engine[s], [True] * len(ids)) for s, ids in enumerate(rollouts.completions)}
    minibatches: list[list[RolloutMicroBatch]] = []
    for plan in plans:
        batches = rollout_micro_batches(
            plan,
            tokens,
            rollouts.prompts,
            rollouts.advantages,
            group_size=GROUP_SIZE,
            batching=batching,
            dp_rank=mesh.dp_rank,
        )
        noise = [rollouts.old_noise[s] for s in plan.samples[mesh.dp_rank]]
        old = policy.logprobs(batches, TEMPERATURE)
        old = [
            None if x is None else x + place_token_values(noise, b)
            for x, b in zip(old, batches, strict=True)
        ]
        ref = reference.logprobs(batches, TEMPERATURE)
        minibatches.append(
            [
                replace(b, old_logprobs=x, ref_logprobs=y)
                for b, x, y in zip(batches, old, ref, strict=True)
            ]
        )
    return [
        policy.update(batches, PolicyLoss(LOSS, plan, MAX_LENGTH), temperature=TEMPERATURE)
        for plan, batches in zip(plans, minibatches, strict=True)
    ]
