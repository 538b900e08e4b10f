"""Every objective, aggregation, KL form, correction and group filter through a whole step.

One step on the real stories260K model over two ranks each; the numbers of the pure functions are
proven in tests/unit/algorithms. What is looked at here is that the option reached the update.
Not covered: that any of them learns better than another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.assets import ASSETS, needed

ROOT = Path(__file__).parents[2]

SMALL = {
    "train.num_steps": 1,
    "rollout.num_prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 60,
    "train.micro_batch_size": 8,
    "checkpoint.export_hf": "false",
}


def _train(folder: Path, **options: object) -> dict[str, float]:
    """Metrics of one step of the stories example with `options` (dots written as two _)."""
    needed("models/stories260K")
    settings = {**SMALL, "run_dir": folder / "run"}
    settings |= {name.replace("__", "."): value for name, value in options.items()}
    command = [sys.executable, "-m", "gdpo_megatron.cli", "train", "examples/stories/gdpo.yaml"]
    command += ["--nproc", "2"]
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "GDPO_ASSETS": str(ASSETS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    asked = options.get("logging__compare_plan") != "false"
    learned = options.get("dynamic_sampling__tolerance") is None
    assert ("the plan beside" in done.stdout) == (asked and learned)
    (line,) = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.mark.distributed
def test_kl_entropy_dual_clip_and_filtered_groups(tmp_path: Path):
    metrics = _train(
        tmp_path,
        parallel__tensor_model_parallel_size=2,
        loss__kl_coef=0.1,
        loss__entropy_coef=0.01,
        loss__dual_clip=3.0,
        dynamic_sampling__filter="advantage",
        dynamic_sampling__max_rounds=3,
    )
    # Two minibatches: before the first one the policy is the reference, after it it is not.
    assert metrics["update/kl"] > 0
    loss = metrics["update/policy_loss"] + 0.1 * metrics["update/kl"]
    assert metrics["update/loss"] == pytest.approx(
        loss - 0.01 * metrics["update/entropy"], abs=1e-6
    )
    kept = metrics["dynamic_sampling/num_groups_kept"]
    assert 1 <= kept <= 4 and metrics["update/num_loss_rows"] == 4 * kept
    assert metrics["advantage/groups_without_signal"] == 0
    # Engine and trainer are two implementations of one model.
    assert metrics["update/mismatch_abs_diff_max"] < 1e-4


@pytest.mark.distributed
def test_a_step_without_anything_to_learn_is_saved_all_the_same(tmp_path: Path):
    metrics = _train(
        tmp_path,
        rollout__max_completion_tokens=8,
        dynamic_sampling__filter="advantage",
        dynamic_sampling__tolerance=1e6,
        dynamic_sampling__max_rounds=2,
    )
    assert metrics["dynamic_sampling/num_rounds"] == 2
    assert metrics["dynamic_sampling/num_groups_kept"] == 0
    assert metrics["dynamic_sampling/num_groups_sampled"] == 8
    assert not any(name.startswith("update/") for name in metrics)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((saved / "run.json").read_text())["policy_version"] == 0


@pytest.mark.distributed
def test_gspo_unbiased_kl_truncated_weights_and_conflict_filter(tmp_path: Path):
    metrics = _train(
        tmp_path,
        loss__objective="gspo",
        loss__aggregation="sequence_mean",
        loss__kl_coef=0.1,
        loss__kl_estimator="k1",
        loss__kl_gradient="unbiased",
        logging__compare_plan="false",
        loss__mismatch__correction="token_truncate",
        advantage__estimator="gd2po",
    )
    assert metrics["update/importance_weight"] == pytest.approx(1.0, abs=1e-5)
    dropped = metrics["advantage/num_dropped_for_conflict"]
    assert metrics["update/num_loss_rows"] == 16 - dropped
    assert metrics["update/ratio_max"] < 1.5  # one ratio per sequence moves less than per token


@pytest.mark.distributed
@pytest.mark.full
def test_cispo_fixed_length_and_the_engines_logprobs(tmp_path: Path):
    metrics = _train(
        tmp_path,
        parallel__pipeline_model_parallel_size=2,
        loss__objective="cispo",
        loss__aggregation="fixed_length",
        loss__old_logprobs="rollout",
        advantage__preset="verl",
    )
    assert metrics["update/mismatch_abs_diff_max"] == 0  # the ratio itself is taken to the engine
    assert metrics["update/ratio_max"] > 1


@pytest.mark.distributed
@pytest.mark.full
def test_no_old_pass_icepop_and_a_primary_reward(tmp_path: Path):
    metrics = _train(
        tmp_path,
        loss__old_logprobs="current",
        train__num_minibatches_per_step=1,
        loss__mismatch__correction="icepop",
        advantage__estimator="grpo_no_std",
        dynamic_sampling__filter="primary_reward",
        dynamic_sampling__primary_reward="speech",
    )
    assert metrics["update/ratio_max"] == 1.0
    assert metrics["update/importance_weight_bounded"] == 0
    assert metrics["dynamic_sampling/num_groups_kept"] >= 1
