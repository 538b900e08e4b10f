"""What is said of a first step: which rank, which error, which lengths its time is planned for.

That the figures are right is looked at where ranks run: tests/e2e/test_quickstart_flow.py, and
layout by layout tests/distributed/test_plan_measured.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.plan_jobs import plan_job

from gdpo_megatron.planning.first_step import RankRows, memory_lines, with_lengths
from gdpo_megatron.planning.job import Shape
from gdpo_megatron.planning.machine import GPUS, gpu_of
from gdpo_megatron.planning.step_time import time_plan
from gdpo_megatron.platform import detect_platform

SHAPE = Shape(rows=4, columns=128, num_microbatches=2, row_tokens=128)


def test_the_fullest_rank_is_shown_and_the_largest_error_of_all():
    little = RankRows("rank 0", SHAPE, 90.0, [("parameters", 1024.0, 2048.0, -0.5)])
    much = RankRows("rank 1", SHAPE, 90.0, [("parameters", 4352.0, 4096.0, 0.0625)])
    for ranks in ([little, much], [much, little]):
        head, _, row = memory_lines(ranks)
        assert "rank 1, the fullest of 2" in head
        assert "2 micro-batches, the largest of 4 x 128 tokens" in head
        assert row.split() == ["parameters", "4.2", "KiB", "4.0", "KiB", "+6.2%", "-50.0%"]


def test_time_is_planned_for_the_lengths_that_were(tmp_path: Path):
    """Half the completion tokens: at most as much of everything, and half of generating them."""
    job = plan_job(tmp_path, "Qwen2.5-7B", 8)
    longest = job.config.rollout.max_completion_tokens
    room = job.config.model.max_sequence_length - longest
    plans = [
        time_plan(planned, GPUS["h100-80"], 8, given)
        for share in (0.5, 0.25)
        for planned, given in [with_lengths(job, longest * share + room / 4, longest * share)]
    ]
    for plan, share in zip(plans, (0.5, 0.25), strict=True):
        of_step = job.rows_per_update * job.updates_per_step
        assert plan.step_tokens == pytest.approx(of_step * (longest * share + room / 4))
    assert plans[1].phases["update"] < plans[0].phases["update"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H200", "h200-141"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 PCIe", None),  # other rates than those of the table
        (detect_platform().device_name, "cpu"),
    ],
)
def test_rates_are_those_of_the_very_device(device: str, name: str | None):
    assert gpu_of(device) == name
