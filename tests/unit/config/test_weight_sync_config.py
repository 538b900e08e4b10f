"""The `weight_sync` section: what is refused, in which words; and the canary's bounds.

That the keys do what they say is in tests/distributed/test_weight_sync.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gdpo_megatron.config.schema import DataConfig, ModelConfig, RLConfig
from gdpo_megatron.config.weight_sync import CanaryConfig, WeightSyncConfig
from gdpo_megatron.validate import _run
from gdpo_megatron.weight_sync.canary import CanaryResult, Tolerance, tolerance_of


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"bucket_mb": 0}, "greater than 0"),
        ({"checksum_interval": -1}, "greater than or equal to 0"),
        ({"canary": {"interval": -1}}, "greater than or equal to 0"),
        ({"canary": {"num_prompts": 0}}, "greater than 0"),
        ({"canary": {"num_tokens": 0}}, "greater than 0"),
        ({"canary": {"max_logprob_diff": 0.0}}, "greater than 0"),
        (
            {"canary": {"max_logprob_diff": 0.1, "mean_logprob_diff": 0.2}},
            "mean_logprob_diff 0.2 is above max_logprob_diff 0.1",
        ),
    ],
)
def test_refused(section: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        WeightSyncConfig(**section)


def config(**canary: Any) -> RLConfig:
    return RLConfig(
        run_dir="run",
        model=ModelConfig(hf_path="model", max_sequence_length=300),
        data=DataConfig(train="rows.jsonl"),
        rewards=(),
        weight_sync=WeightSyncConfig(canary=CanaryConfig(**canary)),
    )


def test_a_canary_without_room_for_a_prompt_is_refused():
    assert _run(config(num_tokens=299), "train") == []
    assert _run(config(num_tokens=300), "train") == [
        "weight_sync.canary.num_tokens 300 leaves no room for a prompt in "
        "model.max_sequence_length 300"
    ]
    assert _run(config(num_tokens=300, interval=0), "train") == []


def test_tolerance():
    assert tolerance_of(CanaryConfig(), "float32") == Tolerance(1e-4, 2e-5)
    assert tolerance_of(CanaryConfig(), "bfloat16") == Tolerance(0.5, 0.05)
    own = CanaryConfig(max_logprob_diff=0.7, mean_logprob_diff=0.01)
    assert tolerance_of(own, "bfloat16") == Tolerance(0.7, 0.01)


@pytest.mark.parametrize(
    ("largest", "mean", "passes"),
    [
        (0.5, 0.05, True),
        (0.51, 0.01, False),
        (0.4, 0.06, False),
        (float("inf"), float("inf"), False),
        (float("nan"), 0.0, False),
    ],
)
def test_both_bounds_count(largest: float, mean: float, passes: bool):
    result = CanaryResult(
        max_logprob_diff=largest, mean_logprob_diff=mean, num_tokens=9, worst="prompt 'x'"
    )
    assert (result.findings(Tolerance(0.5, 0.05)) == []) is passes
