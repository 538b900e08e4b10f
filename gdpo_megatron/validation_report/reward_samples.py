"""The rewards, called on a few rows: each row's own answer as the completion, and an empty one.

They are called as a run calls them, in the suite's processes, in groups of two. What they say of
real completions only a run shows; here it is seen that they can be called, and that they tell an
answer from nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gdpo_megatron.config.schema import RewardConfig, RLConfig
from gdpo_megatron.data.schema import REWARDS_KEY
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.rewards.scores import RewardScores
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.sandbox import Sandbox, SandboxUnavailable, is_sandbox_user
from gdpo_megatron.types import Completion, Prompt, Rollout, Turn
from gdpo_megatron.validation_report.situation import Section, Situation, counted

NUM_ROWS = 8
_EMPTY, _GROUP_SIZE = "", 2


def rewards_section(it: Situation) -> Section:
    """Scores of a few rows of data.train, or of each evaluation set."""
    section = Section("rewards")
    config = it.config
    assert isinstance(config, RLConfig)
    if it.job == "train":
        prompts = [row for row in it.found.rows if isinstance(row, Prompt)]
        _score(it, section, config.rewards, prompts, "data.train")
    else:
        for loaded in it.found.sets:
            own = loaded.eval_set
            _score(it, section, own.rewards, loaded.prompts, own.key)
    return section


def _score(
    it: Situation,
    section: Section,
    rewards: Sequence[RewardConfig],
    prompts: Sequence[Prompt],
    where: str,
) -> None:
    config, tokenizer = it.config, it.found.tokenizer
    assert isinstance(config, RLConfig) and tokenizer is not None
    rows = some_rows(prompts, [reward.name for reward in rewards])
    suite = RewardSuite(
        rewards,
        group_size=_GROUP_SIZE,
        config=config.reward_suite,
        sandbox=config.sandbox,
        base_dir=it.base_dir,
    )
    if it.world.elsewhere and any(is_sandbox_user(own.fn.function) for own in suite.rewards):
        try:
            Sandbox(config.sandbox).close()
        except SandboxUnavailable:
            section.lines.append(f"{where}: not called, they need a sandbox, and none works here")
            return
    try:
        with suite:
            for rollout in _rollouts(rows, tokenizer, config.rollout.environment is not None):
                suite.submit(rollout)
            scores = suite.collect()
    except RuntimeError as error:  # a worker that cannot find a reward, or its pool is gone
        section.problems.append(f"rewards: {error}")
        return
    section.lines.append(
        f"{where}: {counted(len(rows), 'row')}, with its answer (where it has none its prompt) as "
        "completion, and an empty one"
    )
    for column, name in enumerate(scores.names):
        text, callable_ = _of_reward(scores, column)
        section.lines.append(f"  {name}: {text}")
        if not callable_:
            section.problems.append(f"rewards.{name}: no sample of {where} has a score: {text}")


def some_rows(prompts: Sequence[Prompt], names: Sequence[str]) -> list[Prompt]:
    """Rows to try: for each reward one that is its own, then some that are spread over the file."""
    first = (
        next((k for k, row in enumerate(prompts) if _is_of(row, name)), None) for name in names
    )
    spread = (k * len(prompts) // NUM_ROWS for k in range(NUM_ROWS))
    chosen = dict.fromkeys([*(k for k in first if k is not None), *spread])
    return [prompts[k] for k in sorted(list(chosen)[: max(NUM_ROWS, len(names))])]


def _is_of(row: Prompt, name: str) -> bool:
    own = row.metadata.get(REWARDS_KEY)
    return own is None or name in own


def _rollouts(rows: Sequence[Prompt], tokenizer: Tokenizer, with_turns: bool) -> Iterator[Rollout]:
    for group_id, row in enumerate(rows):
        answer = row.text if row.answer is None else row.answer
        for place, text in enumerate((answer, _EMPTY)):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()
            turns = (Turn(start=0, end=len(ids), text=text),) if with_turns else ()
            yield Rollout(
                group_id=group_id,
                sample_id=_GROUP_SIZE * group_id + place,
                prompt=row,
                completion=Completion(
                    token_ids=ids, logprobs=(0.0,) * len(ids), text=text, finish_reason="stop"
                ),
                policy_version=0,
                turns=turns,
            )


def _of_reward(scores: RewardScores, column: int) -> tuple[str, bool]:
    """What a reward said, and whether it could be called."""
    name, parts = scores.names[column], list[str]()
    applies = ~scores.not_applicable[:, column]
    valid = ~scores.raw[:, column].isnan()
    for place, what in enumerate(("answers", "empty")):
        mine = (scores.sample_ids % _GROUP_SIZE == place) & valid
        values = scores.raw[mine, column]
        if len(values):
            low, mean, high = (float(x) for x in (values.min(), values.mean(), values.max()))
            span = f"{mean:.3g} ({low:.3g} to {high:.3g})" if low < high else f"{mean:.3g}"
            parts.append(f"{what} {span}")
    parts += [f"{n} invalid: {why}" for why, n in scores.num_invalid.get(name, {}).items()]
    detail = next((why for (_, it), why in scores.reasons.items() if it == name), None)
    if scores.num_invalid.get(name) and detail is not None:
        parts.append(f"the first: {detail}")
    if not bool(applies.any()):
        parts.append("says nothing about any of them")
    return ", ".join(parts), bool(valid.any()) or not bool(applies.any())
