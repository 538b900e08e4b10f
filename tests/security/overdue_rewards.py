"""A code reward whose call is over its time when a test says so; see tests/support/told_time.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from support import told_time

from gdpo_megatron.rewards import REWARDS, RewardSample


def tests_until(sample: RewardSample, path: str) -> Any:
    """code_pass_rate; a call for a program that never ends is overdue when there is such a file."""
    if "while" in sample.completion:
        threading.Thread(target=_say_after, args=(Path(path),), daemon=True).start()
    return REWARDS.get("code_pass_rate")(sample)


def _say_after(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    told_time.say(told_time.FOREVER)
