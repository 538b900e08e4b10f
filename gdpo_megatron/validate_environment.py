"""What can be known to be wrong about `rollout.environment` before a rank is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gdpo_megatron.config.reward import RewardFnConfig
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.data.chat_turns import ObservationEncoder
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.environments.base import Environment
from gdpo_megatron.environments.resolve import environment_factory
from gdpo_megatron.errors import did_you_mean
from gdpo_megatron.sandbox import Sandbox, SandboxUnavailable, is_sandbox_user


def environment_problems(
    config: RLConfig,
    base_dir: Path,
    tokenizer: Tokenizer | None,
    rewards: Sequence[RewardFnConfig],
) -> list[str]:
    """Problems of the section, and of rewards of type `environment`.

    `sandbox.configure` must have been called.

    Args:
        config: the loaded config.
        base_dir: folder that its relative paths start from.
        tokenizer: of the policy; None where it could not be read.
        rewards: all that are measured.

    Raises:
        InputError: the environment cannot be made, or its answers cannot be shown to the model.
    """
    section = config.rollout.environment
    if section is None:
        return [
            f"rewards '{it.name}': type environment needs rollout.environment"
            for it in rewards
            if it.type == "environment"
        ]
    environment = environment_factory(section.type, section.args, base_dir)()
    if tokenizer is not None:
        role, limit = section.observation_role, section.max_observation_tokens
        ObservationEncoder(tokenizer, role=role, max_tokens=limit)
    problems = list(_reward_names(environment, rewards))
    problems += _programs(environment, section.step_timeout_seconds, config)
    if config.rollout.long_tail.is_cut:
        problems.append(
            "rollout.environment and rollout.long_tail: a completion of several turns cannot be "
            "broken off and carried over; set one of the two to its default"
        )
    return problems


def _reward_names(environment: Environment, rewards: Sequence[RewardFnConfig]) -> Iterator[str]:
    known = getattr(environment, "reward_names", None)
    if known is None:  # it does not say
        return
    for it in rewards:
        name = it.args.get("name")
        if it.type == "environment" and isinstance(name, str) and name not in known:
            hint = did_you_mean(name, known)
            yield f"rewards '{it.name}': the environment gives no reward '{name}'; {hint}"


def _programs(environment: Environment, timeout: float, config: RLConfig) -> Iterator[str]:
    if not is_sandbox_user(environment):
        return
    # A program that hangs is answered; cut off with the step, its rollout would have no reward.
    longest = getattr(environment, "longest_step_seconds", 0.0)
    if timeout <= longest:
        yield (
            f"rollout.environment.step_timeout_seconds is {timeout:g}, but programs of the model "
            f"may take {longest:g} s of a step; set it above that, or lower sandbox.wall_seconds "
            f"{config.sandbox.wall_seconds:g}"
        )
    try:
        Sandbox(config.sandbox).close()
    except SandboxUnavailable as error:
        who = "rollout.environment runs programs of the model"
        yield from (f"{who}: {problem}" for problem in error.problems)
