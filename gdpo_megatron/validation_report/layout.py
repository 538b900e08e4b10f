"""Who holds what, and how a step's rows come to the ranks."""

from __future__ import annotations

from collections.abc import Iterator

from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.planning.job import Job
from gdpo_megatron.planning.tables import layout_name
from gdpo_megatron.validation_report.situation import Section, Situation, World, counted


def model_section(it: Situation) -> Section:
    """The model, and what it is read with."""
    arch, tokenizer = it.found.arch, it.found.tokenizer
    assert arch is not None and tokenizer is not None
    how = "weights drawn anew" if it.config.model.init == "random" else "its weights' headers fit"
    experts = f", {arch.moe.num_experts} experts" if arch.moe is not None else ""
    return Section(
        "model",
        [
            f"{arch.family}, {it.planned.num_parameters:,} parameters: {arch.num_layers} layers of "
            f"{arch.hidden_size}{experts}, {arch.max_position_embeddings} positions; {how}",
            f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} tokens, of the model's "
            f"{arch.vocab_size}",
        ],
    )


def layout_section(it: Situation) -> Section:
    """The trainer's layout over the nodes, and which of its groups cross them."""
    world, planned = it.world, it.planned
    lines = [
        f"{counted(world.size, 'rank')} on {counted(world.num_nodes, 'node')}, "
        f"{layout_name(planned)}"
    ]
    if planned.pp * planned.vp > 1:
        stages = planned.stage_layers
        lines.append(f"layers of each stage: {', '.join(map(str, stages))}")
    # Ranks are numbered tp first, then cp, dp, pp (Megatron's order tp-cp-ep-dp-pp).
    for key, size in (("tensor", planned.tp), ("tensor x context", planned.tp * planned.cp)):
        if size > 1 and _crosses(size, world):
            lines.append(f"note: {key} parallel groups of {size} cross nodes, which is slow")
            break
    return Section("layout", lines)


def engine_section(it: Situation) -> Section:
    """The engines that generate: replicas of so many ranks, and what each gets."""
    config, world = it.config, it.world
    assert isinstance(config, RLConfig)
    rollout = config.rollout
    size = rollout.tensor_parallel_size
    replicas = world.size // size
    sampling = config.eval if it.job == "eval" else rollout
    lines = [
        f"{rollout.engine}: {counted(replicas, 'replica')} of TP{size}, each decodes up "
        f"to {sampling.max_concurrent_sequences} completions at a time"
    ]
    if it.job == "train":
        prompts, groups = rollout.num_prompts_per_step, rollout.group_size
        most, idle = -(-prompts // replicas), max(0, replicas - prompts)
        lines.append(
            f"{counted(most, 'prompt')} x {groups} = {most * groups} completions of a step for each"
        )
        if idle:
            lines.append(f"note: {idle} of them have nothing to do")
    if size > 1 and _crosses(size, world):
        lines.append(f"note: engines of {size} ranks cross nodes, which is slow")
    return Section("engines", lines)


def batch_section(it: Situation) -> Section:
    """From a step's rows to the micro-batches of a rank."""
    return Section("batches", list(_batch_lines(it.config, it.planned)))


def _batch_lines(config: RLConfig | SFTConfig, planned: Job) -> Iterator[str]:
    rows = planned.rows_per_update
    if isinstance(config, RLConfig):
        prompts, group = config.rollout.num_prompts_per_step, config.rollout.group_size
        number = config.train.num_minibatches_per_step
        most = "up to " * (prompts % number > 0)
        yield (
            f"{counted(prompts, 'prompt')} x {group} = {prompts * group} completions of a step, in "
            f"{counted(number, 'minibatch')} (optimizer steps) of {most}{rows}"
        )
        what = "completions"
    else:
        yield f"{rows} rows of a step"
        what = "rows"
    shape = planned.shape()
    of_rank = -(-rows // planned.dp)
    most = "up to " * (rows % planned.dp > 0)
    yield (
        f"{counted(planned.dp, 'data-parallel rank')}: {most}{of_rank} {what} each, "
        f"{_micro_batches(config, planned)}"
    )
    yield (
        f"the longest: {shape.rows} x {shape.columns} positions in a micro-batch, padding included"
    )
    if rows < planned.dp:
        yield f"note: {planned.dp - rows} data-parallel ranks have no rows"
    if planned.pp > 1 and shape.num_microbatches < planned.pp:
        yield (
            f"note: {shape.num_microbatches} micro-batches do not fill {planned.pp} pipeline "
            "stages; a smaller train.micro_batch_size has a smaller bubble"
        )


def _micro_batches(config: RLConfig | SFTConfig, planned: Job) -> str:
    number, budget = planned.shape().num_microbatches, config.train.max_tokens_per_micro_batch
    if budget is None:
        rows = min(config.train.micro_batch_size, -(-planned.rows_per_update // planned.dp))
        return f"in {counted(number, 'micro-batch')} of up to {rows}"
    packed = "packed" if config.train.packing else "padded"
    return f"{packed} into micro-batches of up to {budget} tokens, {number} where all are longest"


def _crosses(size: int, world: World) -> bool:
    """Whether some of the groups of consecutive ranks lie on several nodes."""
    return world.num_nodes > 1 and world.ranks_of_node % size != 0
