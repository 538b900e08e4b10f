"""From the `rewards` section to functions: whatever is wrong with the section is found here.

This runs in the launcher, before a model is built, so it imports neither torch nor anything that a
reward needs only when it is called. All problems are reported together.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from gdpo_megatron.config.reward import GateConfig, RewardConfig
from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.rewards.base import REWARDS, RewardFn


@dataclass(frozen=True, slots=True)
class ResolvedReward:
    """A reward of the run, ready to be called as `fn.function(sample, **args)`."""

    name: str
    weight: float
    fn: RewardFn
    args: Mapping[str, Any]
    when: GateConfig | None = None


def resolve_rewards(
    rewards: Sequence[RewardConfig], base_dir: Path | None = None
) -> tuple[ResolvedReward, ...]:
    """Find the functions of the configured rewards and check their arguments.

    Args:
        rewards: the section, in the order that the reward matrix will have.
        base_dir: folder of the config, from which `./file.py:function` starts.

    Raises:
        InputError: no reward at all, an unknown type, a name used twice, arguments that do not fit
            the function's signature, a condition on an unknown reward, on itself or in a circle.
    """
    problems = list(_name_problems(rewards)) + list(_gate_problems(rewards))
    resolved: list[ResolvedReward] = []
    for index, reward in enumerate(rewards):
        where = f"rewards[{index}] '{reward.name}'"
        try:
            fn = RewardFn.of(_find(reward.type, base_dir))
            args = _check_args(fn, reward)
        except InputError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
        else:
            resolved.append(ResolvedReward(reward.name, reward.weight, fn, args, reward.when))
    if problems:
        raise InputError(problems)
    return tuple(resolved)


def _name_problems(rewards: Sequence[RewardConfig]) -> Iterator[str]:
    if not rewards:
        yield "rewards: at least one reward is needed"
    first: dict[str, int] = {}
    for index, reward in enumerate(rewards):
        if first.setdefault(reward.name, index) != index:
            taken = f"rewards[{first[reward.name]}]"
            yield f"rewards[{index}]: name '{reward.name}' is taken by {taken}"


def _gate_problems(rewards: Sequence[RewardConfig]) -> Iterator[str]:
    gates = {reward.name: reward.when.reward for reward in rewards if reward.when}
    names = {reward.name for reward in rewards}
    for index, reward in enumerate(rewards):
        target = gates.get(reward.name)
        where = f"rewards[{index}] '{reward.name}'.when.reward"
        if target is None:
            continue
        if target not in names:
            yield f"{where}: no reward named '{target}'; {did_you_mean(target, names)}"
            continue
        chain = [reward.name]
        while target is not None and target not in chain:
            chain.append(target)
            target = gates.get(target)
        # A circle is told once, by its alphabetically first member.
        if target == reward.name == min(chain):
            circle = " -> ".join([*chain, reward.name])
            yield f"{where}: the condition depends on itself: {circle}"


def _find(reward_type: str, base_dir: Path | None) -> Any:
    function = REWARDS.get(reward_type, base_dir)
    if inspect.isclass(function):
        raise InputError(f"type '{reward_type}' is a class; name a function or an instance")
    if not callable(function):
        raise InputError(
            f"type '{reward_type}' is {type(function).__name__}, which cannot be called; "
            f"name a function"
        )
    return function


def _check_args(fn: RewardFn, reward: RewardConfig) -> dict[str, Any]:
    """Return `args` as the function's annotations want them, or raise InputError."""
    signature = inspect.signature(fn.function)
    parameters = list(signature.parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in positional:
        shown = "samples" if fn.batch else "sample"
        raise InputError(f"type '{reward.type}' must take the {shown} first: fn({shown}, **args)")
    sample, *options = parameters
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [option.name for option in options if option.kind in by_name]
    takes_any = any(option.kind is inspect.Parameter.VAR_KEYWORD for option in options)

    problems = [
        f"args.{option.name} is missing; type '{reward.type}' needs it"
        for option in options
        if option.kind in (*by_name, inspect.Parameter.POSITIONAL_ONLY)
        and option.default is inspect.Parameter.empty
        and option.name not in reward.args
    ]
    hints = _annotations(fn.function)
    args: dict[str, Any] = {}
    for name, value in reward.args.items():
        if name not in known and (not takes_any or name == sample.name):
            problems.append(
                f"args.{name} is unknown to type '{reward.type}'; {did_you_mean(name, known)}"
            )
            continue
        try:
            args[name] = _as_annotated(hints[name], value) if name in hints else value
        except ValidationError as error:
            wrong = "; ".join(detail["msg"] for detail in error.errors())
            problems.append(f"args.{name} is {value!r}: {wrong}")
    if problems:
        raise InputError(problems)
    return args


def _annotations(function: Any) -> dict[str, Any]:
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return get_type_hints(target, include_extras=True)
    except (NameError, TypeError):
        # Names under TYPE_CHECKING, or a functools.partial: the values go in unchecked.
        return {}


def _as_annotated(annotation: Any, value: Any) -> Any:
    try:
        adapter = TypeAdapter[Any](
            annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        )
    except PydanticUserError:  # models and dataclasses carry a config of their own
        adapter = TypeAdapter[Any](annotation)
    return adapter.validate_python(value)
