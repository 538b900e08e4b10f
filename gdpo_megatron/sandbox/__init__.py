"""Runs programs that a model wrote without letting them near anything else; see docs/sandbox.md.

`configure` is called once in each process that runs rewards, `shared_sandbox` by the rewards.
"""

from gdpo_megatron.sandbox.shared import (
    close_shared,
    configure,
    shared_config,
    shared_sandbox,
)

__all__ = [
    "close_shared",
    "configure",
    "shared_config",
    "shared_sandbox",
]
