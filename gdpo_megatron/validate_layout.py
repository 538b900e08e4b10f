"""What can be known to be wrong about `parallel` before a rank is started (see validate.py)."""

from __future__ import annotations

from gdpo_megatron.config.schema import ParallelConfig, RLConfig, SFTConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.pipeline import stage_layers
from gdpo_megatron.errors import InputError
from gdpo_megatron.platform import detect_platform


def layout_problems(
    job: str,
    config: RLConfig | SFTConfig,
    world_size: int,
    arch: ModelArchitecture | None,
    *,
    uneven_gathers: bool | None = None,
) -> list[str]:
    """Problems of the layout, of the ranks that it is for and of the model that it cuts.

    Args:
        job: "train", "sft" or "eval".
        config: the loaded config.
        world_size: ranks.
        arch: of the model; None where it could not be read.
        uneven_gathers: whether all_gather takes parts of different sizes where the job will run;
            None asks this machine.
    """
    parallel = config.parallel
    problems = _world(parallel, world_size) + _packing(config)
    if arch is None:
        return problems
    key = "parallel.tensor_model_parallel_size"
    problems += divides(key, parallel.tensor_model_parallel_size, arch)
    try:
        stage_layers(arch.num_layers, parallel)
    except InputError as error:
        problems += error.problems
    return problems + _experts(job, arch, parallel, world_size, uneven_gathers)


def divides(key: str, size: int, arch: ModelArchitecture) -> list[str]:
    """What of a model cannot be shared by `size` ranks evenly; `key` asked for it."""
    counts = {
        "attention heads": arch.num_attention_heads,
        "key/value heads": arch.num_key_value_heads,
        "MLP columns": arch.mlp_columns,
    }
    return [
        f"{key} {size} does not divide the model's {count} {what}"
        for what, count in counts.items()
        if count % size
    ]


def engine_layout_problems(config: RLConfig, arch: ModelArchitecture, world_size: int) -> list[str]:
    """What of the engines' layout does not fit the model or the ranks.

    vLLM gives each rank a copy of a key/value head where there are more ranks than heads; the
    native engine, as Megatron, does not.
    """
    key, size = "rollout.tensor_parallel_size", config.rollout.tensor_parallel_size
    problems = divides(key, size, arch)
    repeats = size % arch.num_key_value_heads == 0
    if config.rollout.engine == "vllm" and repeats:
        problems = [it for it in problems if not it.endswith("key/value heads")]
    if world_size % size:
        problems.append(f"{key} {size} does not divide {world_size} ranks")
    return problems


def _world(parallel: ParallelConfig, world_size: int) -> list[str]:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, problems = parallel.context_parallel_size, list[str]()
    if world_size % (tp * pp * cp):
        by_context = f" x context_parallel_size {cp}" if cp > 1 else ""
        problems.append(
            f"{world_size} ranks (--nproc x --nnodes) do not fit "
            f"parallel.tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}"
            f"{by_context}: start a multiple of {tp * pp * cp}"
        )
    vp = parallel.virtual_pipeline_model_parallel_size
    if vp > 1 and pp == 1:
        problems.append(
            f"parallel.virtual_pipeline_model_parallel_size is {vp}, but there is one stage only; "
            "set it to 1, or pipeline_model_parallel_size above 1"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        problems.append(
            "parallel.overlap_param_gather is true, which needs overlap_grad_reduce; set both"
        )
    if parallel.sequence_parallel and tp == 1:
        problems.append(
            "parallel.sequence_parallel is true, but there is no tensor parallelism to share "
            "tokens with; set it to false, or parallel.tensor_model_parallel_size above 1"
        )
    return problems


def _packing(config: RLConfig | SFTConfig) -> list[str]:
    cp = config.parallel.context_parallel_size
    if config.train.packing and cp > 1:
        return [
            f"train.packing is true, but parallel.context_parallel_size is {cp}: its ranks hold "
            "pieces of each row, and packed rows are not cut into any; set train.packing to false"
        ]
    return []


def _experts(
    job: str,
    arch: ModelArchitecture,
    parallel: ParallelConfig,
    world_size: int,
    uneven_gathers: bool | None,
) -> list[str]:
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep_key, etp_key = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
    if arch.moe is None:
        return [
            f"{key} is {size}, but {arch.family} has no experts; set it to 1"
            for key, size in ((ep_key, ep), (etp_key, etp))
            if size > 1
        ]
    problems: list[str] = []
    if arch.moe.num_experts % ep:
        problems.append(f"{ep_key} {ep} does not divide the model's {arch.moe.num_experts} experts")
    if arch.moe.intermediate_size % etp:
        problems.append(
            f"{etp_key} {etp} does not divide an expert's {arch.moe.intermediate_size} columns"
        )
    if world_size % (pp * ep * etp):
        problems.append(
            f"{ep_key} {ep} x expert_tensor_parallel_size {etp} x pipeline_model_parallel_size "
            f"{pp} does not divide {world_size} ranks"
        )
    if job == "eval":
        return problems
    if tp > 1 and not parallel.sequence_parallel:
        problems.append(
            f"parallel.sequence_parallel is false: a mixture of experts is trained with "
            f"tensor_model_parallel_size {tp} only under it; set it to true"
        )
    if ep > 1 and etp > 1 and uneven_gathers is None:
        uneven_gathers = detect_platform().gathers_uneven_parts
    if ep > 1 and etp > 1 and not uneven_gathers:
        # Each of the ranks that share an expert comes with the tokens that were sent to it.
        problems.append(
            f"{etp_key} is {etp}, but with expert parallelism its ranks exchange unequal numbers "
            f"of tokens, which {(platform := detect_platform()).backend} cannot gather on this "
            f"platform ({platform.name}); set it to 1"
        )
    if ep == 1 and etp != tp:
        problems.append(
            f"{etp_key} is {etp}, but without expert parallelism Megatron takes experts to be "
            f"shared as the rest is; set it to {tp}, or set {ep_key}"
        )
    return problems
