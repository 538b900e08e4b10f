"""Sandboxes of each mode that works here, started once, and the attacks' bait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Bait, baited, quick_config
from support.told_suite import told  # noqa: F401 (a fixture)

from gdpo_megatron.sandbox import Sandbox, SandboxUnavailable
from gdpo_megatron.sandbox.syscalls import supported
from gdpo_megatron.sandbox.worker import landlock_abi

_REASONS = ("not installed", "namespace", "Operation not permitted", "Permission denied")


def start(mode: str, **options) -> Sandbox:
    """A sandbox; skips where this machine lacks a layer, and only then."""
    try:
        return Sandbox(quick_config(mode, **options))
    except SandboxUnavailable as error:
        lacks = not supported() or (mode == "inner" and not landlock_abi())
        if lacks or (mode == "bwrap" and any(reason in str(error) for reason in _REASONS)):
            pytest.skip(str(error))  # the kernel or the container lacks the layer under test
        raise


@pytest.fixture(scope="session", params=["bwrap", "inner"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with start(request.param) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def bait() -> Iterator[Bait]:
    with baited() as bait:
        yield bait
