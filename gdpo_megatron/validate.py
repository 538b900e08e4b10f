"""Everything about a job that can be known to be wrong before a rank is started.

A check looks at one thing and returns lines; all lines are reported together. Data files are read
and tokenised as the workers will do. Nothing is written, no weights are read (only the headers of
their files), and Megatron is not imported.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gdpo_megatron.algorithms import logprob_problems, resolve_estimator
from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture, NoModel
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.model_folder import model_files, open_checkpoint
from gdpo_megatron.data.prompts import SFTRow, load_prompts, load_sft_rows
from gdpo_megatron.data.rows import DataRow, read_rows
from gdpo_megatron.data.schema import REWARDS_KEY
from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.evaluation.loaded import LoadedSet
from gdpo_megatron.observability.profiling import profiling_problems
from gdpo_megatron.platform.megatron_versions import megatron_version
from gdpo_megatron.platform.vllm_versions import vllm_problems
from gdpo_megatron.rewards.resolve import ResolvedReward
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import engines
from gdpo_megatron.rollout.long_tail import long_tail_problems
from gdpo_megatron.rollout.stall import GRACE_SECONDS
from gdpo_megatron.run_folder import CONFIG_FILE
from gdpo_megatron.sandbox import (
    NUM_TRIES,
    Sandbox,
    SandboxUnavailable,
    configure,
    is_sandbox_user,
)
from gdpo_megatron.types import Prompt
from gdpo_megatron.validate_environment import environment_problems
from gdpo_megatron.validate_eval import eval_checks, eval_rewards, row_problems
from gdpo_megatron.validate_fp8 import fp8_problems
from gdpo_megatron.validate_layout import engine_layout_problems, layout_problems
from gdpo_megatron.validate_lora import lora_problems
from gdpo_megatron.validate_memory import memory_problems

Check = Callable[[], "list[str] | None"]


@dataclass(slots=True)
class Found:
    """What the checks have read of a job; None is what they could not, or what it has none of."""

    arch: ModelArchitecture | None = None
    tokenizer: Tokenizer | None = None
    suite: RewardSuite | None = None
    only_evaluated: list[ResolvedReward] = field(default_factory=list[ResolvedReward])
    rows: Sequence[Prompt | DataRow] = ()
    """Of data.train, in `train`."""
    sft_rows: Sequence[SFTRow] = ()
    sets: list[LoadedSet] = field(default_factory=list[LoadedSet])


def validate(
    job: str,
    config: RLConfig | SFTConfig,
    base_dir: Path,
    world_size: int,
    *,
    elsewhere: bool = False,
) -> Found:
    """Check a job.

    Args:
        job: "train", "sft" or "eval".
        config: the loaded config, whose keys and ranges are right.
        base_dir: folder that its relative paths start from.
        world_size: ranks that it will be started with.
        elsewhere: it will run on GPUs of other machines: what this one lacks for it (vLLM, FP8, a
            sandbox, a backend that gathers uneven parts) is no problem.

    Raises:
        InputError: all problems found.
    """
    problems: list[str] = []
    found = Found()
    for check in _checks(job, config, base_dir, world_size, found, elsewhere):
        try:
            problems += check() or []
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return found


def _checks(
    job: str,
    config: RLConfig | SFTConfig,
    base_dir: Path,
    world_size: int,
    found: Found,
    elsewhere: bool,
) -> Iterator[Check]:
    """What one check finds is there for the next; one whose subject is missing is left out."""
    model = config.model
    folder = resolve_path(base_dir, model.hf_path)

    def load_arch() -> None:
        try:
            found.arch = load_architecture(model_files(folder))
        except NoModel as error:
            raise InputError(f"model.hf_path: {error}") from error

    def read_tokenizer() -> None:
        if model.tokenizer_path is not None or folder.is_dir():  # else it is told already
            own = model.tokenizer_path
            path = resolve_path(base_dir, own) if own else model_files(folder)
            found.tokenizer = load_tokenizer(path)

    def load_rewards() -> None:
        assert isinstance(config, RLConfig)
        group_size = config.rollout.group_size
        found.suite = RewardSuite(config.rewards, group_size=group_size, base_dir=base_dir)

    def load_eval_rewards() -> None:
        assert isinstance(config, RLConfig)
        found.only_evaluated.extend(eval_rewards(config, base_dir))

    yield _megatron
    yield lambda: _run_dir(job, config, base_dir)
    yield load_arch
    yield read_tokenizer
    arch, tokenizer = found.arch, found.tokenizer
    if arch is not None:
        yield lambda: _sizes(config, arch, tokenizer)
        if model.init == "pretrained":
            yield lambda: _weights(folder, arch)
    gathers = True if elsewhere else None
    yield lambda: layout_problems(job, config, world_size, arch, uneven_gathers=gathers)
    yield lambda: lora_problems(job, config, base_dir, arch)
    yield lambda: memory_problems(job, config, arch)
    yield lambda: fp8_problems(job, config, arch, elsewhere=elsewhere)
    yield lambda: _optimizer(config, job)
    if job != "eval":
        steps = config.train.num_steps
        yield lambda: profiling_problems(config.profiling, steps, world_size, elsewhere=elsewhere)
    if isinstance(config, SFTConfig):
        yield lambda: _sft_data(config, base_dir, found)
        return
    if arch is not None:
        yield lambda: _engine(config, arch, world_size, base_dir, elsewhere)
    configure(config.sandbox)  # answers are checked by its rules
    yield load_rewards
    yield load_eval_rewards
    if found.suite is not None:
        rewards = (*found.suite.rewards, *found.only_evaluated)
        yield lambda: _sandbox(config, rewards, elsewhere)
    measured = (*config.rewards, *config.eval.rewards)
    yield lambda: environment_problems(config, base_dir, tokenizer, measured)
    yield lambda: _run(config, job)
    if job == "train":
        yield lambda: long_tail_problems(
            config.rollout.long_tail,
            num_prompts=config.rollout.num_prompts_per_step,
            group_size=config.rollout.group_size,
            num_replicas=max(1, world_size // config.rollout.tensor_parallel_size),
            dynamic_filter=config.dynamic_sampling.filter,
        )
        yield lambda: _estimator(config, base_dir)
        yield lambda: _prompts(config, base_dir, found)
    yield from eval_checks(job, config, base_dir, tokenizer, found.sets)


def _megatron() -> None:
    megatron_version()  # before a rank meets it


def _run_dir(job: str, config: RLConfig | SFTConfig, base_dir: Path) -> list[str]:
    run_dir = resolve_path(base_dir, config.run_dir)
    there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not there.is_dir():
        return [f"run_dir: {there} is a file"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"run_dir: no permission to write in {there}"]
    recorded = run_dir / CONFIG_FILE
    if job == "eval" or not recorded.is_file():
        return []
    problems: list[str] = []
    before = "train" if "rewards" in yaml_text.read_mapping(recorded, problems) else "sft"
    if before != job:
        problems.append(f"run_dir: {run_dir} holds a run of `{before}`; `{job}` needs another one")
    return problems


def _sizes(
    config: RLConfig | SFTConfig, arch: ModelArchitecture, tokenizer: Tokenizer | None
) -> list[str]:
    problems: list[str] = []
    if config.model.max_sequence_length > arch.max_position_embeddings:
        problems.append(
            f"model.max_sequence_length is {config.model.max_sequence_length}, but the model has "
            f"only {arch.max_position_embeddings} positions"
        )
    if arch.sliding_window is not None and config.model.max_sequence_length > arch.sliding_window:
        problems.append(
            f"model.max_sequence_length is {config.model.max_sequence_length}, but the model "
            f"attends within a sliding window of {arch.sliding_window}, which is not supported; "
            "up to that length it makes no difference"
        )
    if tokenizer is not None and tokenizer.vocab_size > arch.vocab_size:
        problems.append(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {arch.vocab_size}; "
            "set model.tokenizer_path to the model's own"
        )
    if isinstance(config, RLConfig):
        for name, sampling in (("rollout", config.rollout), ("eval", config.eval)):
            # vLLM refuses them at the first request; elsewhere they would never come.
            outside = [i for i in sampling.stop_token_ids or () if not 0 <= i < arch.vocab_size]
            if outside:
                problems.append(
                    f"{name}.stop_token_ids: {', '.join(map(str, outside[:5]))} are no tokens of "
                    f"the model, which has {arch.vocab_size}"
                )
    return problems


def _weights(folder: Path, arch: ModelArchitecture) -> None:
    try:
        open_checkpoint(folder, arch)
    except NoModel as error:
        hint = "set model.init: random to draw new ones"
        raise InputError(f"model.hf_path: {error}; {hint}") from error


def _engine(
    config: RLConfig, arch: ModelArchitecture, world_size: int, base_dir: Path, elsewhere: bool
) -> list[str]:
    import gdpo_megatron.rollout.engines  # noqa: F401  # registers them

    rollout, problems = config.rollout, engine_layout_problems(config, arch, world_size)
    try:
        engines.get(rollout.engine, base_dir)
    except InputError as error:
        problems += [f"rollout.engine: {problem}" for problem in error.problems]
    waited = config.launch.collective_timeout_seconds
    longest = waited - 2 * GRACE_SECONDS
    if rollout.stall_timeout_seconds > longest:
        problems.append(
            f"rollout.stall_timeout_seconds is {rollout.stall_timeout_seconds:g}, but the other "
            f"ranks wait for an engine for {waited:g} s only (launch.collective_timeout_seconds); "
            f"take {longest:g} or less, or let them wait longer"
        )
    if rollout.vllm is not None and rollout.engine != "vllm":
        problems.append(
            f"rollout.vllm is set, but rollout.engine is {rollout.engine}; remove it, or set "
            "rollout.engine to vllm"
        )
    if rollout.engine == "vllm" and not elsewhere:
        problems += [f"rollout.engine: {problem}" for problem in vllm_problems()]
    return problems


def _run(config: RLConfig, job: str) -> list[str]:
    if job != "train":
        return []
    problems: list[str] = []
    if config.rollout.max_completion_tokens >= config.model.max_sequence_length:
        problems.append(
            f"rollout.max_completion_tokens {config.rollout.max_completion_tokens} leaves no room "
            f"for a prompt in model.max_sequence_length {config.model.max_sequence_length}"
        )
    rollout, train = config.rollout, config.train
    primary, names = config.dynamic_sampling.primary_reward, [r.name for r in config.rewards]
    if primary is not None and primary not in names:
        hint = did_you_mean(primary, names)
        problems.append(f"dynamic_sampling.primary_reward: no reward named '{primary}'; {hint}")
    if rollout.group_size < 2:
        problems.append(
            f"rollout.group_size is {rollout.group_size}: a group of one has no advantage; "
            "use 2 or more"
        )
    if config.advantage.group_ddof >= rollout.group_size:
        problems.append(
            f"advantage.group_ddof {config.advantage.group_ddof} must be below "
            f"rollout.group_size {rollout.group_size}"
        )
    if train.num_minibatches_per_step > rollout.num_prompts_per_step:
        problems.append(
            f"train.num_minibatches_per_step {train.num_minibatches_per_step} is more than "
            f"rollout.num_prompts_per_step {rollout.num_prompts_per_step}; each needs a prompt"
        )
    num_tokens = config.weight_sync.canary.num_tokens
    if config.weight_sync.canary.interval and num_tokens >= config.model.max_sequence_length:
        problems.append(
            f"weight_sync.canary.num_tokens {num_tokens} leaves no room for a prompt in "
            f"model.max_sequence_length {config.model.max_sequence_length}"
        )
    problems += logprob_problems(
        config.loss,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        num_minibatches_per_step=train.num_minibatches_per_step,
    )
    return problems


def _sandbox(config: RLConfig, rewards: Sequence[ResolvedReward], elsewhere: bool) -> list[str]:
    using = [reward for reward in rewards if is_sandbox_user(reward.fn.function)]
    if not using:
        return []
    users = [reward.name for reward in using]
    problems = [line for reward in using for line in _too_slow_programs(config, reward)]
    if elsewhere:
        return problems
    try:
        Sandbox(config.sandbox).close()
    except SandboxUnavailable as error:
        who = f"rewards {', '.join(users)} run programs of the model"
        problems += [f"{who}: {problem}" for problem in error.problems]
    return problems


def _too_slow_programs(config: RLConfig, reward: ResolvedReward) -> list[str]:
    """A program that hangs is a score of 0; cut off by the suite, it would be none."""
    option = inspect.signature(reward.fn.function).parameters.get("max_timeouts")
    timeouts = 0 if option is None else reward.args.get("max_timeouts", option.default)
    longest = NUM_TRIES * config.sandbox.wall_seconds * (timeouts + 1)
    limit = config.reward_suite.sample_timeout_seconds
    if limit > longest:
        return []
    return [
        f"reward_suite.sample_timeout_seconds is {limit:g}, but the programs of reward "
        f"'{reward.name}' may take {longest:g} s ({NUM_TRIES} tries x sandbox.wall_seconds "
        f"{config.sandbox.wall_seconds:g} x (max_timeouts {timeouts} + 1)); set it above that"
    ]


def _estimator(config: RLConfig, base_dir: Path) -> None:
    resolve_estimator(config.advantage.estimator, base_dir)


def _optimizer(config: RLConfig | SFTConfig, job: str) -> list[str]:
    if job == "eval":
        return []
    optimizer, problems = config.optimizer, list[str]()
    if optimizer.min_lr > optimizer.lr:
        problems.append(f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}")
    return problems


def _prompts(config: RLConfig, base_dir: Path, found: Found) -> list[str]:
    """Read data.train as the workers will; without tokenizer or room, only its rows."""
    path, tokenizer, suite = config.data.train, found.tokenizer, found.suite
    if path is None:
        return ["data.train: missing; train needs a file of rows"]
    room = config.model.max_sequence_length - config.rollout.max_completion_tokens
    names = [reward.name for reward in config.rewards]
    if tokenizer is None or room < 1:
        rows = read_rows(config.data, path, base_dir=base_dir, kind="rl", reward_names=names)
    else:
        rows = load_prompts(
            config.data,
            tokenizer,
            path=path,
            base_dir=base_dir,
            max_prompt_tokens=room,
            reward_names=names,
        )
    found.rows = rows
    problems = _own_rewards(config, base_dir, path, rows)
    if suite is not None:
        problems += row_problems(resolve_path(base_dir, path), rows, suite)
    return problems


def _own_rewards(
    config: RLConfig, base_dir: Path, path: str, rows: Sequence[DataRow | Prompt]
) -> list[str]:
    """Rows that leave rewards out cannot be trained on where nothing may be missing."""
    names = {reward.name for reward in config.rewards}
    leave_out = [
        row.prompt_id for row in rows if names - set(row.metadata.get(REWARDS_KEY) or names)
    ]
    if config.advantage.missing != "error" or not leave_out:
        return []
    return [
        f"advantage.missing is 'error', but {len(leave_out)} rows of "
        f"{resolve_path(base_dir, path)} leave rewards out by their field '{REWARDS_KEY}', the "
        f"first is '{leave_out[0]}'; missing: exclude is for such data"
    ]


def _sft_data(config: SFTConfig, base_dir: Path, found: Found) -> None:
    path, tokenizer = config.data.train, found.tokenizer
    if path is None:
        raise InputError("data.train: missing; sft needs a file of rows")
    if tokenizer is None:
        read_rows(config.data, path, base_dir=base_dir, kind="sft")
        return
    found.sft_rows = load_sft_rows(
        config.data,
        tokenizer,
        path=path,
        base_dir=base_dir,
        max_sequence_length=config.model.max_sequence_length,
    )
