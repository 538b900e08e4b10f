"""examples/custom_reward works as it stands: its own tests, the forms in a suite, the package.

Not covered: that a model learns from these rewards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from suite_helpers import HERE, rollout

from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.rewards.suite import RewardSuite

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "custom_reward"


def test_the_examples_own_tests_pass():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_every_form_scores_as_configured():
    config = load_config(RLConfig, EXAMPLE / "gdpo.yaml")
    stories = ["The dog was happy.", "A dog sat", "The dog was happy here.", "", "The dog ran."]
    with RewardSuite(
        config.rewards, group_size=4, config=config.reward_suite, base_dir=EXAMPLE
    ) as suite:
        assert [(r.fn.batch, r.fn.is_async, r.fn.stateful) for r in suite.rewards] == [
            (False,) * 3,
            (True, False, False),
            (False, True, False),
            (False, False, True),
        ]
        for sample_id in (4, 2, 0, 1, 3):
            suite.submit(rollout(sample_id, stories[sample_id], group_size=4))
        scores = suite.collect()
    words, unlike, ending, new = (scores.values[:, k].tolist() for k in range(4))
    assert [words[i] for i in (0, 1, 2, 4)] == pytest.approx([2 / 3, 1 / 3, 2 / 3, 1 / 3])
    assert scores.not_applicable[:, 0].tolist() == [False, False, False, True, False]
    # Of the group of four: "a", "sat" of the second one and "here" of the third are theirs alone.
    assert unlike[:4] == pytest.approx([0.0, 2 / 3, 0.2, 0.0])
    assert scores.reasons[4, "unlike"].startswith("group incomplete")
    assert [ending[i] for i in (0, 1, 2, 4)] == [1.0, 0.0, 1.0, 1.0]
    assert scores.reasons[3, "ending"] == "nothing to judge"
    assert new == [1.0, 1.0, 0.0, 1.0, 0.0]  # the others begin with "the dog" as well
    assert scores.report.events["words"] == {"empty": 1}


SCORE = """
import sys
sys.path.insert(0, sys.argv[1])
from suite_helpers import reward, rollout, suite
with suite(reward("short", "brevity", args={"limit": 4})) as running:
    running.submit(rollout(0, "four"))
    running.submit(rollout(1, "seven.."))
    print(running.collect().values[:, 0].tolist())
"""


def test_a_package_is_installed_and_found_by_its_entry_point(tmp_path: Path):
    source, target = tmp_path / "package", tmp_path / "installed"
    shutil.copytree(EXAMPLE / "package", source)  # pip builds in the folder
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    score = [sys.executable, "-c", SCORE, str(HERE)]
    found = subprocess.run(
        score, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(target)},
        timeout=600,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[1.0, 0.25]"
    missing = subprocess.run(score, capture_output=True, text=True, timeout=600)
    assert missing.returncode != 0 and "no reward named 'brevity'" in missing.stderr
