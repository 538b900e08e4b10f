"""The one sandbox of a process: rewards take it from here, whoever runs rewards configures it.

Every process that runs rewards calls `configure` once; nothing is started before the first reward
asks. A sandbox belongs to the process that started it, so a forked child starts its own.
"""

from __future__ import annotations

import atexit
import os
import threading
from typing import Any, TypeVar

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.sandbox.pool import Sandbox

_lock = threading.Lock()
_config = SandboxConfig()
_num_workers = 1
_sandbox: Sandbox | None = None
_owner = 0


F = TypeVar("F")
_MARK = "__gdpo_uses_sandbox__"


def uses_sandbox(function: F) -> F:
    """Mark what calls `shared_sandbox`, a reward or an environment: a run needs one to start."""
    setattr(function, _MARK, True)
    return function


def is_sandbox_user(function: Any) -> bool:
    """Whether a reward function or an environment is marked by `uses_sandbox`."""
    return getattr(function, _MARK, False)


def configure(config: SandboxConfig, *, num_workers: int = 1) -> None:
    """Say what sandbox this process's rewards get; one that differs and runs already is closed.

    Args:
        config: the `sandbox` section.
        num_workers: programs that may run at a time; others wait.
    """
    global _config, _num_workers
    with _lock:
        if (config, num_workers) != (_config, _num_workers):
            _close()
            _config, _num_workers = config, num_workers


def shared_config() -> SandboxConfig:
    """The section that was configured last; its defaults where none was."""
    return _config


def shared_sandbox() -> Sandbox:
    """The sandbox of this process, started by the first call.

    Raises:
        SandboxUnavailable: this machine cannot have the configured one.
    """
    global _sandbox, _owner
    with _lock:
        if _sandbox is None or _owner != os.getpid():
            _sandbox, _owner = Sandbox(_config, num_workers=_num_workers), os.getpid()
        return _sandbox


def close_shared() -> None:
    """End this process's sandbox; a later call of `shared_sandbox` starts another."""
    with _lock:
        _close()


def _close() -> None:
    global _sandbox
    if _sandbox is not None and _owner == os.getpid():
        _sandbox.close()
    _sandbox = None


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it when this process was forked


os.register_at_fork(after_in_child=_renew_lock)
atexit.register(close_shared)
