"""A set with its prompts, and where its results go; all that is known without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.evaluation.sets import EvalSet, known_rewards, plain_section
from gdpo_megatron.types import Prompt


def label_of(config: RLConfig, base_dir: Path) -> str:
    """The name of an evaluation by `eval`."""
    return config.eval.label or resolve_path(base_dir, config.model.hf_path).name


def evaluation_folder(config: RLConfig, base_dir: Path, label: str) -> Path:
    """Where the results of an evaluation are."""
    return resolve_path(base_dir, config.run_dir) / "eval" / label


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSet:
    """A set with its prompts.

    Args:
        eval_set: of the config.
        prompts: that are evaluated.
        num_left_out: rows whose prompts are too long.
        identity: what its completions and scores depend on, weights apart.
    """

    eval_set: EvalSet
    prompts: Sequence[Prompt]
    num_left_out: int
    identity: Mapping[str, Any]

    def chunks(self, config: RLConfig) -> list[tuple[int, int]]:
        """(first, end) of the prompts of each chunk."""
        size = -(-config.eval.num_completions_per_chunk // self.eval_set.samples_per_prompt)
        count = len(self.prompts)
        return [(first, min(first + size, count)) for first in range(0, count, size)]


def load_set(
    eval_set: EvalSet, config: RLConfig, base_dir: Path, tokenizer: Tokenizer
) -> LoadedSet:
    """Read a set's prompts.

    Raises:
        InputError: see EvalSet.load.
    """
    prompts, num_left_out = eval_set.load(tokenizer, base_dir, known_rewards(config))
    identity = {
        **eval_set.identity(prompts, base_dir),
        "seed": config.seed,
        "engine": config.rollout.engine,
        "environment": plain_section(config.rollout.environment),
        "dtype": config.precision.params_dtype,
        "num_completions_per_chunk": config.eval.num_completions_per_chunk,
    }
    return LoadedSet(
        eval_set=eval_set, prompts=prompts, num_left_out=num_left_out, identity=identity
    )
