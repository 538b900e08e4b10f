"""The table of metrics, and what is written of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gdpo_megatron.errors import InputError
from gdpo_megatron.observability import metrics
from gdpo_megatron.observability.metrics import (
    METRICS,
    MetricsLogger,
    combine_minibatches,
    declare_metric,
    find_metric,
    metrics_page,
)

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def fresh_declarations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metrics, "_declared", dict(metrics._declared))
    yield


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def log_steps(run_dir: Path, first: int, last: int, value: float, **options: bool) -> None:
    options = {"tensorboard": False, **options}
    with MetricsLogger(run_dir, start_step=first, **options) as logger:
        for step in range(first, last + 1):
            logger.log(step, {"update/loss": value})


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("update/loss", "update/loss"),
        ("reward/format/mean", "reward/{reward}/mean"),
        ("reward/two-words_1/mean", "reward/{reward}/mean"),
        ("eval/mean_tokens", "eval/mean_tokens"),
        ("eval/format/mean", "eval/{reward}/mean"),
        ("time/step_seconds", "time/step_seconds"),
        ("time/rollout_seconds", "time/{phase}_seconds"),
    ],
)
def test_a_name_is_found_in_the_table(name: str, declared: str):
    assert find_metric(name).name == declared


@pytest.mark.parametrize(
    "name",
    [
        "reward/a/b/mean",
        "reward//mean",
        "update/losss",
        "time/_seconds",
        "xupdate/loss",
        "update/loss ",
    ],
)
def test_an_undeclared_name_is_refused(tmp_path: Path, name: str):
    for enabled in (True, False):
        logger = MetricsLogger(tmp_path / str(enabled), tensorboard=False, enabled=enabled)
        with pytest.raises(ValueError, match="is not declared; did you mean"):
            logger.log(0, {"update/loss": 1.0, name: 2.0})
        logger.close()
    assert (tmp_path / "True" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "False").exists()


def test_a_metric_can_be_declared_once(fresh_declarations: None, tmp_path: Path):
    declare_metric("advantage/{mine}_share", "share", "What I count.")
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(0, {"advantage/kept_share": 0.25})
    assert lines_of(tmp_path) == [{"step": 0, "advantage/kept_share": 0.25}]
    for name in ("advantage/{mine}_share", "update/loss"):
        with pytest.raises(ValueError, match="already declared"):
            declare_metric(name, "share", "Again.")


def test_the_table_is_well_formed():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert "/" in metric.name and metric.unit and metric.definition.endswith((".", ")."))


def test_minibatches_combine_as_declared():
    combined = combine_minibatches(
        [
            {"update/loss": 1.0, "completion/max_tokens": 2.5, "optimizer/lr": 1e-3},
            {"update/loss": 4.0, "completion/max_tokens": 1.5, "optimizer/lr": 2e-3},
            {"update/loss": 1.0, "completion/max_tokens": 2.0, "rollout/num_tokens": 7},
            {"rollout/num_tokens": 5, "optimizer/grad_norm": 0.5},
        ]
    )
    assert combined == {
        "update/loss": 2.0,
        "completion/max_tokens": 2.5,
        "optimizer/lr": 2e-3,
        "rollout/num_tokens": 12.0,
        "optimizer/grad_norm": 0.5,
    }


def test_a_nan_is_not_lost_in_a_maximum():
    lengths = (1.0, math.nan, 2.0)
    combined = combine_minibatches([{"completion/max_tokens": it} for it in lengths])
    assert math.isnan(combined["completion/max_tokens"])


def test_one_json_object_per_step_flushed(tmp_path: Path):
    logger = MetricsLogger(tmp_path / "run", tensorboard=False)
    logger.log(0, {"update/loss": 0.5, "rollout/num_tokens": 12})
    logger.log(2, {"update/loss": math.nan, "optimizer/grad_norm": -math.inf, "optimizer/lr": 0.0})
    assert lines_of(tmp_path / "run") == [
        {"step": 0, "update/loss": 0.5, "rollout/num_tokens": 12.0},
        {"step": 2, "update/loss": None, "optimizer/grad_norm": None, "optimizer/lr": 0.0},
    ]
    with pytest.raises(ValueError, match="step 2 is logged after step 2"):
        logger.log(2, {"update/loss": 0.5})
    logger.close()


def test_resume_drops_what_will_be_repeated(tmp_path: Path):
    log_steps(tmp_path, 0, 4, value=1.0)
    log_steps(tmp_path, 3, 5, value=2.0)
    assert lines_of(tmp_path) == [
        {"step": step, "update/loss": 1.0 if step < 3 else 2.0} for step in range(6)
    ]
    log_steps(tmp_path, 0, 0, value=3.0)
    assert lines_of(tmp_path) == [{"step": 0, "update/loss": 3.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path):
    log_steps(tmp_path, 0, 2, value=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "update/lo')
    log_steps(tmp_path, 4, 4, value=2.0)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 4]


def test_a_damaged_line_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: no metrics of a step"):
        MetricsLogger(tmp_path, tensorboard=False, start_step=5)


def test_tensorboard_holds_the_same_after_a_resume(tmp_path: Path):
    log_steps(tmp_path, 0, 4, value=1.0, tensorboard=True)
    log_steps(tmp_path, 3, 5, value=2.0, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("update/loss")]
    assert scalars == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_the_page_is_current():
    # Those of the update are declared by the module that computes them.
    import gdpo_megatron.step_metrics  # noqa: F401

    assert (REPOSITORY / "docs" / "metrics.md").read_text() == metrics_page(), (
        "run: python tools/write_docs.py"
    )
