"""Import, log-probs, three updates and export of a small model in a layout, on this rank.

What is run is what the trainer runs: minibatch plans, micro-batches, the loss, the optimizer. What
the ranks of a layout hold is brought to the form of one process, so that layouts can be compared.

Imports Megatron: the platform has prepared it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.certify.layout_models import (
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
from gdpo_megatron.config.fp8 import Fp8Config
from gdpo_megatron.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.data.batching import (
    collect_token_values,
    make_micro_batches,
    place_token_values,
)
from gdpo_megatron.data.micro_batching import MicroBatching
from gdpo_megatron.distributed import mesh as meshes
from gdpo_megatron.distributed.mesh import Mesh
from gdpo_megatron.platform import Platform
from gdpo_megatron.policy import weights as policy_weights
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.update import (
    MinibatchPlan,
    PolicyLoss,
    RolloutMicroBatch,
    plan_minibatches,
    rollout_micro_batches,
)


@contextmanager
def in_layout(
    platform: Platform,
    *,
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
    """The constructor arguments of a model in a layout; several can follow each other.

    Args:
        platform: the machine.
        tp: tensor parallel size.
        pp: pipeline parallel size.
        cp: context parallel size.
        vp: virtual pipeline stages of a rank.
        ep: expert parallel size.
        etp: tensor parallel size within experts.
        sp: sequence parallelism.
        overlap: gradients and parameters of data-parallel ranks move while others are computed.
        stages: `parallel.pipeline_model_parallel_layout`.
    """
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
    meshes.destroy()
    gc.collect()


def run_updates(
    folder: Path,
    model: str,
    layout: Mapping[str, Any],
    engine_logprobs: Sequence[list[float]] | None = None,
    *,
    dtype: str = "float32",
    updates: int = NUM_MINIBATCHES,
    batching: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that layouts are compared by.

    Args:
        folder: of `write_models`.
        model: its name.
        layout: of `in_layout`, within it.
        engine_logprobs: by sample, what the engine is said to have had; None: see `with_noise`, of
            this policy's own log-probs.
        dtype: of the parameters.
        updates: how many of the minibatches.
        batching: keys of `train` where they are not the usual ones.

    Returns:
        "names" of the tensors that are exported, those that "changed" on their way in and out,
        "logprobs" and "logprobs_after" by sample on ranks of the last stage, "rows_of_ranks" and
        statistics ("steps", "padding") of each update; on rank 0 "weights" at the end and
        "gradients" of each update, whole, under Hugging Face names.
    """
    mesh, rollouts = layout["mesh"], make_rollouts()
    train = TrainConfig(**{"micro_batch_size": MICRO_BATCH_SIZE, **(batching or {})})
    policy, reference = make_models(folder, model, layout, dtype=dtype, packing=train.packing)
    reader = HFCheckpoint(folder / model, policy.arch)
    exported = [(name, tensor.clone()) for name, tensor in policy.hf_tensors()]
    gradients: list[dict[str, Tensor]] = []
    keep_gradients(policy, gradients)
    micro_batching = policy.micro_batching(train)
    plans = make_plans(rollouts, mesh.dp_size, policy.arch.hidden_size)
    result: dict[str, Any] = {
        "names": [name for name, _ in exported],
        "changed": [name for name, x in exported if not torch.equal(x, reader.get(name).to(x))],
        "logprobs": own_logprobs(policy, rollouts, micro_batching, mesh),
        "rows_of_ranks": [[len(ids) for ids in plan.samples] for plan in plans],
    }
    if engine_logprobs is None:
        engine_logprobs = with_noise(result["logprobs"], rollouts)
    result["steps"] = update_policy(
        policy, reference, plans[:updates], rollouts, engine_logprobs, micro_batching, mesh
    )
    result["padding"] = [step.pop("padding_share") for step in result["steps"]]
    result["logprobs_after"] = own_logprobs(policy, rollouts, micro_batching, mesh)
    weights = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    result["weights"] = weights if mesh.rank == 0 else {}
    result["gradients"] = gradients if mesh.rank == 0 else []
    return result


def make_models(
    folder: Path,
    model: str,
    layout: Mapping[str, Any],
    *,
    dtype: str = "float32",
    fp8: Fp8Config | None = None,
    packing: bool = False,
    **of_policy: Any,
) -> tuple[MegatronPolicy, MegatronModel]:
    """The policy of a model and its reference, which has other weights.

    Args:
        folder: of `write_models`.
        model: its name.
        layout: of `in_layout`, within it.
        dtype: of the parameters.
        fp8: the `precision.fp8` section.
        packing: rows of a micro-batch end to end.
        of_policy: more arguments of MegatronPolicy.
    """
    arch = load_architecture(folder / model)
    precision: dict[str, Any] = {"params_dtype": dtype, "fp8": fp8}
    layout = {
        **layout,
        "precision": PrecisionConfig(**precision),
        "max_sequence_length": MAX_LENGTH,
        "packing": packing,
    }
    reader = HFCheckpoint(folder / model, arch)
    policy = MegatronPolicy(
        arch,
        optimizer=OPTIMIZER,
        total_updates=3,
        make_reader=lambda: reader,
        **layout,
        **of_policy,
    )
    reference = MegatronModel(arch, **layout)
    reference.load_hf(HFCheckpoint(folder / f"{model}_reference", arch))
    reference.freeze()
    return policy, reference


def make_plans(rollouts: Rollouts, dp_size: int, hidden_size: int) -> list[MinibatchPlan]:
    """The minibatches of the rollouts."""
    return plan_minibatches(
        rollouts.loss_rows,
        [len(prompt.token_ids) for prompt in rollouts.prompts],
        rollouts.lengths,
        group_size=GROUP_SIZE,
        num_minibatches=NUM_MINIBATCHES,
        dp_size=dp_size,
        hidden_size=hidden_size,
    )


def with_noise(
    logprobs: Mapping[int, Sequence[float]] | Sequence[Sequence[float]], rollouts: Rollouts
) -> list[list[float]]:
    """What the engine is said to have had: log-probs of a model with noise, by sample."""
    return [
        [x + e for x, e in zip(logprobs[sample], noise, strict=True)]
        for sample, noise in enumerate(rollouts.rollout_noise)
    ]


def keep_gradients(policy: MegatronPolicy, kept: list[dict[str, Tensor]]) -> None:
    """Note the reduced gradients of each update, whole and under Hugging Face names."""
    finalize: Any = policy.config.finalize_model_grads_func

    def wrapped(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        for chunk in policy.ddp:
            ddp: Any = chunk  # whose buffers are lists, unlike a module's
            for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]:
                for bucket in buffer.buckets:
                    _gather_shards(bucket.grad_data, buffer.data_parallel_group)
        own = {row.hf: p for row, p in policy.stage_rows if not row.import_only}
        kept.append({})
        for row in policy_weights.mapping_rows(policy.arch):  # as a mistake may have it
            if not row.import_only:
                # DDP has given every parameter its gradient.
                shard: Any = own.get(row.hf)
                shard = None if shard is None else shard.main_grad.clone()
                whole = policy.whole_tensors(row, row.layout, shard, row.shapes)
                kept[-1] |= {n: x.clone() for n, x in zip(row.hf, whole, strict=True)}

    policy.config.finalize_model_grads_func = wrapped


def _gather_shards(gradients: Tensor, group: Any) -> None:
    """Each data-parallel rank has reduced a part: bring the parts together."""
    if group.size() > 1:
        own = gradients.chunk(group.size())[group.rank()].clone()
        dist.all_gather_into_tensor(gradients, own, group=group)


def own_logprobs(
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


def update_policy(
    policy: MegatronPolicy,
    reference: MegatronModel,
    plans: Sequence[MinibatchPlan],
    rollouts: Rollouts,
    engine: Sequence[list[float]],
    batching: MicroBatching,
    mesh: Mesh,
) -> list[dict[str, float]]:
    """One optimizer step per minibatch, the way the trainer does it; their statistics."""
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
            None if x is None else x + place_token_values(noise, b).to(x)
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
