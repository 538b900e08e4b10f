"""How many rows there are, how long, and how often a run goes over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.data.rows import read_rows
from gdpo_megatron.types import Prompt
from gdpo_megatron.validation_report.situation import Section, Situation


def data_section(it: Situation) -> Section:
    """Of data.train, in the jobs that train, and of the evaluation sets."""
    return Section("data", [*_train_lines(it), *_set_lines(it)])


def lengths_text(lengths: Sequence[int]) -> str:
    """Count, median and longest of some rows.

    >>> lengths_text([3, 9, 4])
    '3, of 4 tokens (median), the longest 9'
    """
    return f"{len(lengths)}, of {median(lengths):g} tokens (median), the longest {max(lengths)}"


def _train_lines(it: Situation) -> Iterator[str]:
    config, path = it.config, it.config.data.train
    if it.job == "eval" or path is None:
        return
    kind = "sft" if isinstance(config, SFTConfig) else "rl"
    names = None
    if isinstance(config, RLConfig):
        names = [reward.name for reward in config.rewards]
    there = len(read_rows(config.data, path, base_dir=it.base_dir, kind=kind, reward_names=names))
    if isinstance(config, SFTConfig):
        lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in it.found.sft_rows]
        what, room = "rows", config.model.max_sequence_length
        per_step = config.train.global_batch_size
    else:
        lengths = [len(row.token_ids) for row in it.found.rows if isinstance(row, Prompt)]
        what, per_step = "prompts", config.rollout.num_prompts_per_step
        room = config.model.max_sequence_length - config.rollout.max_completion_tokens
    yield f"data.train: {resolve_path(it.base_dir, path)}"
    yield f"  {what}: {lengths_text(lengths)}; {room} fit; {there - len(lengths)} are left out"
    epochs = config.train.num_steps * per_step / len(lengths)
    yield f"  {config.train.num_steps} steps of {per_step} go over them {epochs:.3g} times"


def _set_lines(it: Situation) -> Iterator[str]:
    for loaded in it.found.sets:
        own = loaded.eval_set
        lengths = [len(prompt.token_ids) for prompt in loaded.prompts]
        yield f"{own.key}: {resolve_path(it.base_dir, own.path)}"
        yield (
            f"  prompts: {lengths_text(lengths)}; {own.room} fit; {loaded.num_left_out} are left "
            f"out; {own.samples_per_prompt} completions of each"
        )
