"""Runs programs that a model wrote without letting them near anything else; see docs/sandbox.md.

`configure` is called once in each process that runs rewards, `shared_sandbox` by the rewards.
"""

from gdpo_megatron.sandbox.pool import NUM_TRIES, Sandbox
from gdpo_megatron.sandbox.results import (
    NO_VALUE,
    Execution,
    Limits,
    SandboxUnavailable,
    Status,
)
from gdpo_megatron.sandbox.shared import (
    close_shared,
    configure,
    is_sandbox_user,
    shared_config,
    shared_sandbox,
    uses_sandbox,
)

__all__ = [
    "NO_VALUE",
    "NUM_TRIES",
    "Execution",
    "Limits",
    "Sandbox",
    "SandboxUnavailable",
    "Status",
    "close_shared",
    "configure",
    "is_sandbox_user",
    "shared_config",
    "shared_sandbox",
    "uses_sandbox",
]
