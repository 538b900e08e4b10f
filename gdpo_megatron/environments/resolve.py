"""From `rollout.environment` to a factory; what is wrong with the section is found here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gdpo_megatron.environments.base import ENVIRONMENTS, Environment
from gdpo_megatron.errors import InputError


def environment_factory(
    kind: str, args: Mapping[str, Any], base_dir: Path | None = None
) -> Callable[[], Environment]:
    """Find an environment's factory and make one with these arguments, to see that it can be.

    Args:
        kind: `rollout.environment.type`.
        args: `rollout.environment.args`. A factory with a parameter `base_dir` gets that as well.
        base_dir: folder of the config, from which `./file.py:factory` starts.

    Raises:
        InputError: no such environment, arguments that do not fit its factory's signature, or that
            the factory refuses; no `reset` or `step`.
    """
    import gdpo_megatron.environments.builtin  # noqa: F401  # registers them

    key = "rollout.environment"
    try:
        factory = ENVIRONMENTS.get(kind, base_dir)
    except InputError as error:
        raise InputError([f"{key}.type: {problem}" for problem in error.problems]) from error
    given = dict(args)
    try:
        signature = inspect.signature(factory)
        if "base_dir" in signature.parameters and "base_dir" not in given:
            given["base_dir"] = base_dir or Path.cwd()
        signature.bind(**given)
    except TypeError as error:
        raise InputError(f"{key}.args: {error} of {kind}") from error
    make = functools.partial(factory, **given)
    try:
        environment = make()
    except InputError as error:
        raise InputError([f"{key}.args: {problem}" for problem in error.problems]) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}.args: {kind} refuses them: {error}") from error
    missing = [name for name in ("reset", "step") if not callable(getattr(environment, name, None))]
    if missing:
        raise InputError(f"{key}.type: what {kind} makes has no {' and no '.join(missing)}")
    return make
