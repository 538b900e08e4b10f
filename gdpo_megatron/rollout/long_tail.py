"""When a step has enough completions, and what becomes of the groups that it does not use.

Each engine decides for itself, from its own share of the step and what it has finished: nothing is
exchanged while tokens are drawn, and all ranks of an engine come to the same end. A group is used
whole or not at all, but for `max_aborted_fraction` without carrying, which leaves rows out of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gdpo_megatron.config.long_tail import LongTailConfig
from gdpo_megatron.data.sampler import PromptSampler
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.types import Completion, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedCompletion:
    """What earlier steps made of a completion.

    Args:
        completion: with finish_reason "abort" where it goes on.
        policy_versions: (first token, version) of each span of its tokens, in order.
    """

    completion: Completion
    policy_versions: tuple[tuple[int, int], ...]

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to generate."""
        return self.completion.finish_reason != "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """A group that a step asks for; equal on all ranks but for `parts`.

    Args:
        prompt: its prompt.
        noise_step: step that asked for it first; names its noise, with noise_group.
        noise_group: its number in that step.
        row: of the data set.
        replica: the engine that has its parts; None where none has.
        steps_carried: steps that asked for it before.
        parts: per completion, what is there of it, on the ranks of that engine; elsewhere, and
            where nothing is there at all, ().
    """

    prompt: Prompt
    noise_step: int
    noise_group: int
    row: int = -1
    replica: int | None = None
    steps_carried: int = 0
    parts: tuple[CarriedCompletion | None, ...] = ()

    def part(self, index: int) -> CarriedCompletion | None:
        """What is there of one completion."""
        return self.parts[index] if self.parts else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What became of the groups that a step asked for; equal on all ranks.

    Args:
        kept: numbers of the groups that the step trains on, ascending.
        returned: numbers of those of which nothing is kept.
        carried: those that go on in the next step.
        counts: the metrics `long_tail/*` of one step, without that prefix.
    """

    kept: tuple[int, ...]
    returned: tuple[int, ...]
    carried: tuple[GroupRequest, ...]
    counts: Mapping[str, float]

    @classmethod
    def joined(cls, cuts: Sequence[Cut]) -> Cut:
        """Of rounds in which every group was kept: how much they made."""
        assert not any(cut.returned or cut.carried for cut in cuts)
        return cls(
            kept=tuple(range(sum(len(cut.kept) for cut in cuts))),
            returned=(),
            carried=(),
            counts=join_counts([cut.counts for cut in cuts]),
        )


def join_counts(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The counts of several engines or rounds as one."""
    return {
        name: (max if name.startswith("max_") else sum)(it[name] for it in counts)
        for name in counts[0]
    }


def deal_groups(groups: Sequence[GroupRequest], num_replicas: int) -> list[int]:
    """The engine of each group: the one that has its parts, else the one with the fewest groups.

    Without carried groups that is group i on engine i mod R.
    """
    counts = [0] * num_replicas
    engines = [-1] * len(groups)
    for index, group in enumerate(groups):
        if group.replica is not None:
            engines[index] = group.replica % num_replicas
            counts[engines[index]] += 1
    for index, engine in enumerate(engines):
        if engine < 0:
            engines[index] = counts.index(min(counts))
            counts[engines[index]] += 1
    return engines


def _deal(total: int, room: Sequence[int]) -> list[int]:
    """Deal `total` to engines in turn, none more than it has room for."""
    dealt, left = [0] * len(room), min(total, sum(room))
    while left:
        for engine, most in enumerate(room):
            if left and dealt[engine] < most:
                dealt[engine] += 1
                left -= 1
    return dealt


class TailCut:
    """Tells one engine when it has enough.

    Args:
        config: the `rollout.long_tail` section.
        groups: all groups of the step, by number.
        engines: the engine of each.
        replica: this engine.
        num_replicas: engines.
        group_size: completions of a group.
        num_wanted: groups that the step is to train on, over all engines.
    """

    def __init__(
        self,
        config: LongTailConfig,
        groups: Sequence[GroupRequest],
        engines: Sequence[int],
        *,
        replica: int,
        num_replicas: int,
        group_size: int,
        num_wanted: int,
    ):
        self._carries = config.max_carried_steps > 0
        own = [g for g, engine in enumerate(engines) if engine == replica]
        room = [list(engines).count(r) for r in range(num_replicas)]
        self._quota = _deal(num_wanted, room)[replica]
        # What may be missing, over all engines: completions; where groups are carried, groups.
        missing = _allowance(config, num_wanted, group_size)
        unit = 1 if self._carries else group_size
        self._budget = _deal(missing, [n * unit for n in room])[replica]
        self._missing = dict.fromkeys(own, group_size)
        self._due = {
            g for g in own if self._carries and groups[g].steps_carried >= config.max_carried_steps
        }

    def finished(self, group: int) -> None:
        """A completion of a group is finished."""
        self._missing[group] -= 1

    def is_enough(self) -> bool:
        """Whether what is unfinished can be broken off; true at the latest when nothing is."""
        if not self._carries:
            return sum(self._missing[g] for g in self.kept()) <= self._budget
        if any(self._missing[g] for g in self._due):
            return False
        return sum(n == 0 for n in self._missing.values()) >= self._quota - self._budget

    def kept(self) -> list[int]:
        """Groups to train on if it ends now, ascending.

        Those that lack the fewest completions, the lower number first; where groups are carried,
        only whole ones, the due ones first.
        """
        order = sorted(self._missing, key=lambda g: (g not in self._due, self._missing[g], g))
        if self._carries:
            order = [g for g in order if not self._missing[g]]
        return sorted(order[: max(self._quota, len(self._due))])


def _allowance(config: LongTailConfig, num_wanted: int, group_size: int) -> int:
    """Completions of a step that may be missing; where groups are carried, groups."""
    unit = 1 if config.max_carried_steps else group_size
    return math.floor(config.max_aborted_fraction * num_wanted * unit + 1e-9)


def long_tail_problems(
    config: LongTailConfig,
    *,
    num_prompts: int,
    group_size: int,
    num_replicas: int,
    dynamic_filter: str,
) -> list[str]:
    """What is wrong with the section beside the others; a line each.

    Args:
        config: the section.
        num_prompts: rollout.num_prompts_per_step.
        group_size: rollout.group_size.
        num_replicas: engines of the run.
        dynamic_filter: dynamic_sampling.filter.
    """
    problems: list[str] = []
    key = "rollout.long_tail"
    if config.max_aborted_fraction and not _allowance(config, num_prompts, group_size):
        what = f"{num_prompts * group_size} completions"
        if config.max_carried_steps:
            what = f"{num_prompts} groups (whole ones count with max_carried_steps)"
        problems.append(
            f"{key}.max_aborted_fraction {config.max_aborted_fraction:g} of a step's {what} is "
            "less than one; raise it, or set it to 0"
        )
    if config.over_provision and num_prompts < num_replicas:
        problems.append(
            f"{key}.over_provision is {config.over_provision:g}, but {num_replicas} engines have "
            f"less than a group each of rollout.num_prompts_per_step {num_prompts}: there is none "
            "to prefer another to; set it to 0, or take more prompts"
        )
    for name in ("over_provision", "max_carried_steps"):
        value = getattr(config, name)
        if value and dynamic_filter != "none":
            problems.append(
                f"{key}.{name} is {value:g}, but dynamic_sampling.filter is {dynamic_filter}, "
                "which chooses the groups by their rewards and draws more of its own; set one of "
                "the two to its default"
            )
    return problems


class LongTail:
    """The groups of a run's steps: carried ones first, new prompts for the rest.

    Args:
        config: the `rollout.long_tail` section.
        sampler: where new prompts come from, and unused ones go back to.
        prompts: rows of the data set.
        num_replicas: engines.
    """

    def __init__(
        self,
        config: LongTailConfig,
        sampler: PromptSampler,
        prompts: Sequence[Prompt],
        num_replicas: int,
    ):
        self._config, self._sampler = config, sampler
        self._prompts, self._num_replicas = prompts, num_replicas
        self.carried: tuple[GroupRequest, ...] = ()

    def ask(self, step: int, num_wanted: int, *, first_group: int = 0) -> list[GroupRequest]:
        """Groups to generate; the next call comes after `settle`.

        Args:
            step: names the noise of the new ones.
            num_wanted: groups to train on.
            first_group: number of the first one in the step; names the noise too.
        """
        spare = math.ceil(num_wanted * self._config.over_provision - 1e-9)
        num_asked = num_wanted + math.ceil(spare / self._num_replicas) * self._num_replicas
        carried, self.carried = self.carried, ()
        rows = self._sampler.next_batch(max(0, num_asked - len(carried)))
        return [
            *carried,
            *(
                GroupRequest(
                    prompt=self._prompts[row], noise_step=step, noise_group=number, row=row
                )
                for number, row in enumerate(rows, first_group + len(carried))
            ),
        ]

    def settle(self, groups: Sequence[GroupRequest], cut: Cut) -> None:
        """Take back what a step did not use."""
        self._sampler.put_back([groups[g].row for g in cut.returned])
        self.carried = cut.carried

    # ---- going on ----------------------------------------------------------------------------

    def own_state(self, engines: EngineMesh) -> list[dict[str, Any]]:
        """The carried groups of the engine that this rank leads, for a checkpoint."""
        return [
            {
                "prompt_token_ids": group.prompt.token_ids,
                "row": group.row,
                "noise_step": group.noise_step,
                "noise_group": group.noise_group,
                "replica": group.replica,
                "steps_carried": group.steps_carried,
                "parts": [None if part is None else asdict(part) for part in group.parts],
            }
            for group in self.carried
            if group.replica == engines.replica and engines.tp_rank == 0
        ]

    def load_carried(
        self,
        states: Iterable[dict[str, Any]],
        *,
        replica: int,
        group_size: int,
        max_completion_tokens: int,
    ) -> None:
        """Take the carried groups of all engines of a checkpoint; the sampler is loaded already.

        A group that no longer fits (other prompt or group size, shorter completions, no carrying)
        is dropped, and its prompt drawn again.

        Args:
            states: what `own_state` returned, of all ranks.
            replica: this rank's engine.
            group_size: completions of a group.
            max_completion_tokens: of a completion.
        """
        carried: list[GroupRequest] = []
        returned: list[int] = []
        for state in states:
            group = self._from_state(state)
            same = group.prompt.token_ids == tuple(state["prompt_token_ids"])
            fits = all(
                part is None
                or part.is_finished
                or len(part.completion.token_ids) < max_completion_tokens
                for part in group.parts
            )
            if self._config.max_carried_steps and same and len(group.parts) == group_size and fits:
                own = group.replica == replica
                carried.append(group if own else replace(group, parts=()))
            else:
                returned.append(group.row)
        # In the order in which they were first asked for, as they were before.
        self.carried = tuple(sorted(carried, key=lambda g: (g.noise_step, g.noise_group)))
        self._sampler.put_back(sorted(returned))

    def _from_state(self, state: dict[str, Any]) -> GroupRequest:
        parts = tuple(None if part is None else _part(part) for part in state["parts"])
        return GroupRequest(
            prompt=self._prompts[state["row"]],
            noise_step=state["noise_step"],
            noise_group=state["noise_group"],
            row=state["row"],
            replica=state["replica"] % self._num_replicas,
            steps_carried=state["steps_carried"],
            parts=parts,
        )


def _part(state: dict[str, Any]) -> CarriedCompletion:
    it = state["completion"]
    return CarriedCompletion(
        completion=Completion(
            token_ids=tuple(it["token_ids"]),
            logprobs=tuple(it["logprobs"]),
            text=it["text"],
            finish_reason=it["finish_reason"],
        ),
        policy_versions=tuple((start, version) for start, version in state["policy_versions"]),
    )
