"""The harness itself: what a failing rank says reaches the reader, and no launch sees another.

That results come back by rank is shown by every other test here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rank_harness import run_ranks

pytestmark = pytest.mark.distributed


def test_failing_rank_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="ValueError: rank 1 is out of luck"):
        run_ranks("rank_smoke:fail_on_one", 2, tmp_path / "run", rank=1)


def test_hanging_rank_is_ended(tmp_path: Path) -> None:
    """It says where it was; should the machine be too busy for that, it is ended all the same."""
    with pytest.raises(pytest.fail.Exception, match=r"hang_on_one|did not end"):
        run_ranks("rank_smoke:hang_on_one", 2, tmp_path / "run", rank=1, timeout=3.0)


def test_ranks_are_new_processes(tmp_path: Path) -> None:
    for n in range(2):
        assert run_ranks("rank_smoke:leave_traces", 2, tmp_path / f"{n}") == [
            (0, 1, None),
            (1, 1, None),
        ]


def test_an_interpreter_starts_them_by_torchrun(tmp_path: Path) -> None:
    arguments = ("rank_smoke:leave_traces", 1, tmp_path / "run")
    assert run_ranks(*arguments, python=sys.executable) == [(0, 1, None)]
