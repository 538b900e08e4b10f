"""The harness itself: what a failing rank says reaches the reader.

That results come back by rank is shown by every other test here. Not covered: that a hanging rank
is ended in time, for which the test would have to wait.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_harness import run_ranks

pytestmark = pytest.mark.distributed


def test_failing_rank_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="ValueError: rank 1 is out of luck"):
        run_ranks("rank_smoke:fail_on_one", 2, tmp_path / "run", rank=1)
