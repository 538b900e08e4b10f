"""The evaluation sets of a config, each with all that it takes from the section around it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gdpo_megatron.config.evaluation import CorrectConfig, EvalConfig, EvalSetConfig
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.reward import RewardConfig, RewardFnConfig
from gdpo_megatron.config.row_fields import RowFieldsConfig
from gdpo_megatron.config.sampling import SamplingConfig
from gdpo_megatron.config.schema import DataConfig, RLConfig
from gdpo_megatron.data.prompts import load_prompts
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.types import Prompt

DATA_EVAL = "data.eval"
"""What the set of that key is called in files; no name of a set has a dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    """One set, resolved.

    Args:
        name: of the set; DATA_EVAL for data.eval.
        path: of its rows, as the config says it.
        data: how rows are read.
        rewards: that score it.
        sampling: how its completions are drawn.
        samples_per_prompt: n.
        num_prompts: the first so many rows; None for all.
        correct: when a completion is right; None where no reward of the set says so.
        exceed_tokens: see EvalConfig.
        max_sequence_length: prompt and completion together.
    """

    name: str
    path: str
    data: DataConfig
    rewards: tuple[RewardConfig, ...]
    sampling: SamplingConfig
    samples_per_prompt: int
    num_prompts: int | None
    correct: CorrectConfig | None
    exceed_tokens: int | None
    max_sequence_length: int

    @property
    def key(self) -> str:
        """Where the config says it, for messages."""
        return "eval" if self.name == DATA_EVAL else f"eval.sets.{self.name}"

    @property
    def metric_prefix(self) -> str:
        """What its metrics begin with."""
        return "eval" if self.name == DATA_EVAL else f"eval/{self.name}"

    @property
    def noise_stream(self) -> str:
        """Keeps the sampling noise of sets apart."""
        return "eval" if self.name == DATA_EVAL else f"eval/{self.name}"

    @property
    def reward_names(self) -> tuple[str, ...]:
        """In the order of the reward matrix."""
        return tuple(reward.name for reward in self.rewards)

    @property
    def room(self) -> int:
        """Tokens that a prompt may have."""
        return self.max_sequence_length - self.sampling.max_completion_tokens

    def load(
        self, tokenizer: Tokenizer, base_dir: Path, reward_names: Sequence[str]
    ) -> tuple[list[Prompt], int]:
        """Read and tokenise its prompts.

        Args:
            tokenizer: of the policy.
            base_dir: folder that a relative path starts from.
            reward_names: those that rows may name.

        Returns:
            The prompts that are evaluated, and how many rows of the file are left out because their
            prompts are too long.

        Raises:
            InputError: see load_prompts; all rows are left out.
        """
        unlimited = replace(self.data, max_prompt_tokens=None)
        rows = load_prompts(
            unlimited,
            tokenizer,
            path=self.path,
            base_dir=base_dir,
            max_prompt_tokens=sys.maxsize,
            reward_names=reward_names,
        )
        limit = min(self.room, self.data.max_prompt_tokens or self.room)
        prompts = [row for row in rows if len(row.token_ids) <= limit]
        if not prompts:
            raise InputError(
                f"data file {resolve_path(base_dir, self.path)}: all {len(rows)} prompts are "
                f"longer than {limit} tokens; raise model.max_sequence_length or lower "
                f"{self.key}.max_completion_tokens"
            )
        return prompts[: self.num_prompts], len(rows) - len(prompts)

    def identity(self, prompts: Sequence[Prompt], base_dir: Path) -> dict[str, Any]:
        """What its completions and scores depend on, weights and seed apart; plain values."""
        digest = hashlib.sha256()
        for prompt in prompts:
            metadata = json.dumps(prompt.metadata, sort_keys=True, default=str)
            parts = (prompt.prompt_id, prompt.token_ids, prompt.answer, metadata)
            digest.update(json.dumps(parts).encode())
        return {
            "data": {
                "sha256": file_sha256(resolve_path(base_dir, self.path)),
                "prompts_sha256": digest.hexdigest(),
            },
            "num_prompts": len(prompts),
            "samples_per_prompt": self.samples_per_prompt,
            "sampling": plain_section(self.sampling),
            "rewards": {
                reward.name: {
                    **(plain_section(reward, "name", "weight") or {}),
                    **_source(reward.type, base_dir),
                }
                for reward in self.rewards
            },
        }


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_section(config: Any, *without: str) -> dict[str, Any] | None:
    """A section of the config as JSON has it, tuples as lists; None for None."""
    if config is None:
        return None
    data = {name: value for name, value in asdict(config).items() if name not in without}
    return json.loads(json.dumps(data))


def _source(spec: str, base_dir: Path) -> dict[str, str]:
    """The contents of ./file.py:name by their hash; of a registered name nothing."""
    file_name = spec.rpartition(":")[0]
    return {"file": file_sha256(base_dir / file_name)} if file_name.endswith(".py") else {}


def known_rewards(config: RLConfig) -> list[str]:
    """Names of all rewards of a config, those that only evaluation asks for included."""
    return [reward.name for reward in (*config.rewards, *config.eval.rewards)]


def resolve_sets(config: RLConfig) -> list[EvalSet]:
    """The sets of a config, data.eval first.

    Raises:
        InputError: all that is wrong with them, the contents of files apart.
    """
    known: dict[str, RewardFnConfig] = {reward.name: reward for reward in config.rewards}
    problems = [
        f"eval.rewards.{reward.name}: there is a reward of that name in `rewards`"
        for reward in config.eval.rewards
        if reward.name in known
    ]
    known |= {reward.name: reward for reward in config.eval.rewards}
    problems += _role_problems(config.eval, known)
    if config.eval.label is not None and not re.fullmatch(r"\w[\w.-]*", config.eval.label):
        label = config.eval.label
        problems.append(f"eval.label is '{label}', but names a folder: letters, digits, _, . and -")
    sets: list[EvalSet] = []
    if config.data.eval is not None:
        sets.append(_data_eval(config, config.data.eval))
    for given in config.eval.sets:
        wrong = list(_reward_problems(given, known, [it.name for it in config.rewards]))
        problems += wrong
        if not wrong:
            sets.append(_named_set(config, given, known))
    for eval_set in sets:
        problems += _set_problems(eval_set)
    if problems:
        raise InputError(problems)
    return sets


def _data_eval(config: RLConfig, path: str) -> EvalSet:
    names = {reward.name for reward in config.rewards}
    return EvalSet(
        name=DATA_EVAL,
        path=path,
        data=config.data,
        rewards=config.rewards,
        sampling=_sampling(config.eval),
        samples_per_prompt=config.eval.samples_per_prompt,
        num_prompts=config.eval.num_prompts,
        correct=_scored_correct(config.eval.correct, names),
        exceed_tokens=config.eval.exceed_tokens,
        max_sequence_length=config.model.max_sequence_length,
    )


def _named_set(config: RLConfig, given: EvalSetConfig, known: dict[str, RewardFnConfig]) -> EvalSet:
    section = config.eval

    def own(key: str) -> Any:
        value = getattr(given, key)
        return getattr(section, key) if value is None else value

    names = [it.name for it in config.rewards] if given.rewards is None else list(given.rewards)
    keys = ("prompt_key", "answer_key", "prompt_template", "system_prompt")
    assert set(keys) == {field.name for field in fields(RowFieldsConfig)}  # pyright: ignore
    overridden = {field.name for field in fields(EvalSetConfig)}  # pyright: ignore
    sampling = asdict(_sampling(section))
    return EvalSet(
        name=given.name,
        path=given.data,
        data=DataConfig(**{key: getattr(given, key) for key in keys}),
        rewards=tuple(_scorer(known[name]) for name in names),
        sampling=SamplingConfig(**sampling | {it: own(it) for it in sampling if it in overridden}),
        samples_per_prompt=own("samples_per_prompt"),
        num_prompts=own("num_prompts"),
        correct=given.correct or _scored_correct(section.correct, set(names)),
        exceed_tokens=own("exceed_tokens"),
        max_sequence_length=config.model.max_sequence_length,
    )


def _sampling(section: EvalConfig) -> SamplingConfig:
    keys = [field.name for field in fields(SamplingConfig)]  # pyright: ignore
    return SamplingConfig(**{key: getattr(section, key) for key in keys})


def _scored_correct(correct: CorrectConfig | None, names: set[str]) -> CorrectConfig | None:
    return correct if correct is not None and correct.reward in names else None


def _scorer(reward: RewardFnConfig) -> RewardConfig:
    """As the reward suite takes it; the weight is not used."""
    return RewardConfig(name=reward.name, type=reward.type, args=reward.args, when=reward.when)


def _role_problems(section: EvalConfig, known: dict[str, RewardFnConfig]) -> Iterator[str]:
    roles = {
        "eval.correct.reward": None if section.correct is None else section.correct.reward,
        "eval.format_reward": section.format_reward,
        "eval.bug_reward": section.bug_reward,
    }
    for key, name in roles.items():
        if name is not None and name not in known:
            yield f"{key}: no reward named '{name}'; {did_you_mean(name, known)}"


def _reward_problems(
    given: EvalSetConfig, known: dict[str, RewardFnConfig], trained: Sequence[str]
) -> Iterator[str]:
    key = f"eval.sets.{given.name}"
    scored = trained if given.rewards is None else given.rewards
    if given.rewards is not None:
        if not given.rewards:
            yield f"{key}.rewards: at least one reward is needed"
        for name in given.rewards:
            gate = known[name].when if name in known else None
            if name not in known:
                yield f"{key}.rewards: no reward named '{name}'; {did_you_mean(name, known)}"
            elif given.rewards.count(name) > 1:
                yield f"{key}.rewards: '{name}' is there {given.rewards.count(name)} times"
            elif gate is not None and gate.reward not in given.rewards:
                yield (
                    f"{key}.rewards: '{name}' is conditioned on '{gate.reward}', which must be in "
                    "the list too"
                )
    if given.correct is not None and given.correct.reward not in scored:
        name = given.correct.reward
        yield f"{key}.correct.reward: no reward of the set is named '{name}'; " + did_you_mean(
            name, scored
        )


def _set_problems(it: EvalSet) -> Iterator[str]:
    longest = it.sampling.max_completion_tokens
    if it.room < 1:
        yield (
            f"{it.key}.max_completion_tokens {longest} leaves no room for a prompt in "
            f"model.max_sequence_length {it.max_sequence_length}"
        )
    if it.exceed_tokens is not None and it.exceed_tokens >= longest:
        yield (
            f"{it.key}.exceed_tokens is {it.exceed_tokens}, but no completion is longer than "
            f"max_completion_tokens {longest}"
        )
    if it.sampling.temperature == 0 and it.samples_per_prompt > 1:
        yield (
            f"{it.key}.samples_per_prompt is {it.samples_per_prompt}, but with temperature 0 all "
            "samples of a prompt are equal; use 1"
        )
    wanted = () if it.correct is None else it.correct.pass_at_k
    if wanted and max(wanted) > it.samples_per_prompt:
        yield (
            f"{it.key}.correct.pass_at_k: {max(wanted)} is more than samples_per_prompt "
            f"{it.samples_per_prompt}"
        )
