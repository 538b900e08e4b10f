"""What can be known to be wrong with an evaluation before a rank is started."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RewardConfig, RLConfig
from gdpo_megatron.data.rows import MAX_PROBLEMS, DataRow, read_rows
from gdpo_megatron.data.schema import REWARDS_KEY
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.errors import InputError
from gdpo_megatron.evaluation.loaded import LoadedSet, evaluation_folder, label_of, load_set
from gdpo_megatron.evaluation.overlap import overlap_problems
from gdpo_megatron.evaluation.sets import EvalSet, known_rewards, resolve_sets
from gdpo_megatron.evaluation.store import SetStore
from gdpo_megatron.rewards.resolve import ResolvedReward, resolve_rewards
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.types import Prompt

Check = Callable[[], "list[str] | None"]

logger = logging.getLogger(__name__)


def eval_rewards(config: RLConfig, base_dir: Path) -> list[ResolvedReward]:
    """The rewards that only evaluation asks for.

    Raises:
        InputError: what is wrong with `eval.rewards`.
    """
    own = [
        RewardConfig(name=it.name, type=it.type, args=it.args, when=it.when)
        for it in config.eval.rewards
        if it.name not in {reward.name for reward in config.rewards}  # told by resolve_sets
    ]
    resolve_rewards(config.rewards, base_dir)
    try:
        resolved = resolve_rewards([*config.rewards, *own], base_dir)
    except InputError as error:
        raise InputError([f"eval.rewards: {problem}" for problem in error.problems]) from error
    return list(resolved[len(config.rewards) :])


def eval_checks(
    job: str,
    config: RLConfig,
    base_dir: Path,
    tokenizer: Tokenizer | None,
    found: list[LoadedSet],
) -> Iterator[Check]:
    """Checks of the sets and their files.

    Args:
        job: "train" or "eval".
        config: the loaded config.
        base_dir: folder that its relative paths start from.
        tokenizer: of the model; without it only rows are looked at.
        found: gets the sets that could be read.
    """
    sets: list[EvalSet] = []

    def find_sets() -> list[str]:
        sets.extend(resolve_sets(config))
        if not sets and (job == "eval" or config.train.eval_interval):
            what = "eval" if job == "eval" else "train.eval_interval"
            return [f"data.eval, eval.sets: {what} needs held-out rows; set one of them"]
        return []

    yield find_sets
    for it in sets:
        yield partial(_set_problems, job, it, config, base_dir, tokenizer, found)
    if config.data.train is None or config.eval.allow_train_overlap or not sets:
        return
    # A model may be evaluated where the rows that it was trained on are not.
    if job == "train" or resolve_path(base_dir, config.data.train).is_file():
        yield lambda: overlap_problems(sets, config.data, base_dir)


def _set_problems(
    job: str,
    it: EvalSet,
    config: RLConfig,
    base_dir: Path,
    tokenizer: Tokenizer | None,
    found: list[LoadedSet],
) -> list[str]:
    rows: Sequence[DataRow | Prompt]
    loaded: LoadedSet | None = None
    if tokenizer is None:
        rows = read_rows(it.data, it.path, base_dir=base_dir, reward_names=known_rewards(config))
    else:
        loaded = load_set(it, config, base_dir, tokenizer)
        rows = loaded.prompts
        found.append(loaded)
        if loaded.num_left_out:
            logger.warning(
                "%s: rows left out, their prompts being longer than %d tokens: %d",
                resolve_path(base_dir, it.path),
                it.room,
                loaded.num_left_out,
            )
    suite = RewardSuite(it.rewards, group_size=it.samples_per_prompt, base_dir=base_dir)
    path = resolve_path(base_dir, it.path)
    problems = row_problems(path, rows, suite)
    names = set(it.reward_names)
    if not any(names & set(row.metadata.get(REWARDS_KEY) or names) for row in rows):
        problems.append(
            f"{path}: its rows name other rewards ('{REWARDS_KEY}': "
            f"{list(rows[0].metadata[REWARDS_KEY])}) than {it.key} has: {sorted(names)}"
        )
    if job == "eval" and loaded is not None:
        folder = evaluation_folder(config, base_dir, label_of(config, base_dir))
        problems += SetStore(folder, it.name).problems(loaded.identity)
    return problems


def row_problems(path: Path, rows: Sequence[DataRow | Prompt], suite: RewardSuite) -> list[str]:
    """Rows that rewards could never score; one line each, not too many."""
    problems = [
        f"{path}, row '{row.prompt_id}': {problem}"
        for row in rows
        for problem in (
            *suite.answer_problems(row.answer, row.metadata),
            *suite.metadata_problems(row.metadata),
        )
    ]
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"{path}: {len(problems) - MAX_PROBLEMS} more problems"]
    return problems
