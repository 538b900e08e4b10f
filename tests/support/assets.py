"""Where tests find the assets outside the repository: $GDPO_ASSETS, default ../shared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ASSETS = Path(os.environ.get("GDPO_ASSETS", Path(__file__).parents[3] / "shared")).resolve()


def needed(name: str) -> Path:
    """A file or folder of the assets; the test that needs it skips where it is absent."""
    path = ASSETS / name
    if not path.exists():
        # Assets are not part of the repository; CI has them, a plain clone need not.
        pytest.skip(f"needs {path}; set GDPO_ASSETS")  # never in CI, which has the assets
    return path
