"""What is planned: a config, the shape of its model, and the world that it would run in.

Nothing but the config and the model's config.json is read: no weights, no tokenizer, no data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture, NoModel
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.conversion.model_folder import model_files
from gdpo_megatron.conversion.pipeline import stage_layers
from gdpo_megatron.errors import InputError
from gdpo_megatron.validate_layout import engine_layout_problems, layout_problems
from gdpo_megatron.validate_memory import memory_problems

FP8_ALIGNMENT = 16
"""Tokens are padded to it under FP8 (policy/fp8.py, which needs Megatron to be imported)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model computes at a time.

    Args:
        rows: of a micro-batch; 1 where rows are packed end to end.
        columns: tokens of a row, or of the pack, padding included.
        num_microbatches: of one data-parallel rank in one update.
        row_tokens: positions of a single row, for attention; `columns` unless packed.
    """

    rows: int
    columns: int
    num_microbatches: int
    row_tokens: int

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A config in a world.

    Args:
        config: of `train` or `sft`.
        arch: of its model.
        world_size: ranks.
    """

    config: RLConfig | SFTConfig
    arch: ModelArchitecture
    world_size: int

    @property
    def kind(self) -> str:
        """`train` or `sft`."""
        return "train" if isinstance(self.config, RLConfig) else "sft"

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.config.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def vp(self) -> int:
        """Stages of each pipeline rank."""
        return self.config.parallel.virtual_pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        """Context-parallel size."""
        return self.config.parallel.context_parallel_size

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def ep(self) -> int:
        """Expert-parallel size."""
        return self.config.parallel.expert_model_parallel_size

    @property
    def etp(self) -> int:
        """Ranks that share each expert."""
        return self.config.parallel.expert_tensor_parallel_size

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.world_size // (self.pp * self.ep * self.etp)

    @property
    def dtype_bytes(self) -> int:
        """Of a parameter, and of an activation."""
        return 2 if self.config.precision.params_dtype == "bfloat16" else 4

    @property
    def num_parameters(self) -> int:
        """Of the model, as its config.json says; adapters apart."""
        return sum(math.prod(shape) for shape in hf_shapes(self.arch).values())

    @property
    def num_padding_parameters(self) -> int:
        """Of the vocabulary in Megatron, over all ranks."""
        tables = 1 if self.arch.tie_word_embeddings else 2
        rows = self.arch.padded_vocab_size(self.tp) - self.arch.vocab_size
        return tables * rows * self.arch.hidden_size

    @property
    def num_adapter_parameters(self) -> int:
        """Of model.lora, over all ranks (policy/lora.py)."""
        lora = self.config.model.lora
        if lora is None:
            return 0
        count = 0
        for row in self.arch.layer_rows:
            target = row.megatron.split("|")[0].split(".")[-2]
            if row.per_expert or target not in lora.target_modules or len(row.tensors[0][1]) != 2:
                continue
            shapes = [[self.arch.size_of(letter) for letter in shape] for _, shape in row.tensors]
            count += lora.rank * (shapes[0][1] + sum(shape[0] for shape in shapes))
        return count * self.arch.num_layers

    @property
    def stage_layers(self) -> list[int]:
        """Of every stage, in the order that a token passes them."""
        return stage_layers(self.arch.num_layers, self.config.parallel)

    @property
    def rows_per_update(self) -> int:
        """Completions (rows, in sft) of one optimizer step, over all ranks."""
        if isinstance(self.config, SFTConfig):
            return self.config.train.global_batch_size
        rollout, train = self.config.rollout, self.config.train
        groups = math.ceil(rollout.num_prompts_per_step / train.num_minibatches_per_step)
        return groups * rollout.group_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a step."""
        train = self.config.train
        return 1 if isinstance(self.config, SFTConfig) else train.num_minibatches_per_step  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def length_multiple(self) -> int:
        """Tokens of a row are padded to it (MegatronModel.length_multiple)."""
        multiple = 2 * self.cp if self.cp > 1 else 1
        if self.config.parallel.sequence_parallel:
            multiple *= self.tp
        return math.lcm(multiple, FP8_ALIGNMENT) if self.config.precision.fp8 else multiple

    def shape(self, row_tokens: int | None = None) -> Shape:
        """Micro-batches of rows of so many tokens; None takes the longest that may come.

        A row of n tokens takes n - 1 positions: the last one predicts nothing.
        """
        train = self.config.train
        tokens = self.config.model.max_sequence_length if row_tokens is None else row_tokens
        positions = max(1, tokens - 1)
        padded = _round_up(positions, self.length_multiple)
        rows = train.micro_batch_size
        if train.max_tokens_per_micro_batch is not None:
            width = positions if train.packing else padded
            rows = max(1, train.max_tokens_per_micro_batch // width)
        of_rank = max(1, math.ceil(self.rows_per_update / self.dp))
        rows = min(rows, of_rank)
        number = math.ceil(of_rank / rows)
        if self.vp > 1:
            number = _round_up(number, self.pp)  # what is added is masked, and computed
        if train.packing:
            return Shape(1, _round_up(rows * positions, self.length_multiple), number, positions)
        return Shape(rows, padded, number, padded)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def load_job(
    path: Path,
    overrides: Sequence[str],
    *,
    world_size: int,
    model_folder: Path | None = None,
    uneven_gathers: bool = True,
) -> Job:
    """Read what is planned, and check that it fits the world.

    Args:
        path: of the config, of `train` or of `sft`.
        overrides: as on the command line of these.
        world_size: ranks.
        model_folder: with the config.json that stands for the model's; None takes model.hf_path.
        uneven_gathers: see Platform; of the machine that the plan is for.

    Raises:
        InputError: all that is wrong with it.
    """
    if not path.is_file():
        raise InputError(f"no config file {path}")
    config = load_either(path, overrides)
    if model_folder is None:
        model_folder = model_files(resolve_path(path.resolve().parent, config.model.hf_path))
    try:
        arch = load_architecture(model_folder)
    except NoModel as error:
        raise InputError(
            f"model.hf_path: {error}; its config.json is all that is read of it: "
            "--model-config FOLDER takes it from elsewhere"
        ) from error
    job = Job(config=config, arch=arch, world_size=world_size)
    problems = job_problems(job, uneven_gathers)
    if problems:
        raise InputError(problems)
    return job


def load_either(path: Path, overrides: Sequence[str]) -> RLConfig | SFTConfig:
    """A config of `train` or of `sft`; of neither, told as of the one that it is nearer to."""
    errors: list[InputError] = []
    for root in (RLConfig, SFTConfig):
        try:
            return load_config(root, path, list(overrides))
        except InputError as error:
            errors.append(error)
    raise min(errors, key=lambda error: len(error.problems))


def job_problems(job: Job, uneven_gathers: bool = True) -> list[str]:
    """Why a config does not fit its world: divisors, keys without an effect."""
    config, arch = job.config, job.arch
    checks: list[Callable[[], list[str]]] = [
        lambda: layout_problems(
            job.kind, config, job.world_size, arch, uneven_gathers=uneven_gathers
        ),
        lambda: memory_problems(job.kind, config, arch),
    ]
    if isinstance(config, RLConfig):
        checks.append(lambda: engine_layout_problems(config, arch, job.world_size))
    problems = [problem for check in checks for problem in check()]
    return list(dict.fromkeys(problems))


def layers_of_rank(job: Job, pp_rank: int) -> list[int]:
    """Layers of each virtual stage of a pipeline rank."""
    stages = job.stage_layers
    return [stages[chunk * job.pp + pp_rank] for chunk in range(job.vp)]
