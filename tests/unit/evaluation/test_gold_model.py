"""A model that answers from the gold file is always right, one that says nothing never is.

Each set is prepared from its asset by `gdpo-megatron data prepare` and scored by the rewards that
examples/evaluation has for it; its gold completion is made here in the form that the reward asks
for. So readers, answers, rewards and counts are one chain. CI takes the first rows of each set, the
mark `full` all. Not covered: that right answers in other forms are seen (the rewards' own tests).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.assets import needed
from support.evaluations import evaluate, save_answering_model, write_config
from support.jobs import read_jsonl

from gdpo_megatron import cli

Row = dict[str, Any]


def boxed(row: Row) -> str:
    return f"Thus it is $\\boxed{{{row['answer']}}}$."


def answer_block(row: Row) -> str:
    return f"<think>{row['solution']}</think>\n<answer>{row['answer']}</answer>"


def program(row: Row) -> str:
    return f"This does it:\n```python\n{row['solution']}\n```"


MATH = ("math", ["correct"], boxed)
CODE = ["pass_rate", "bug_free"]
SETS: dict[str, tuple[str, str, list[str], Callable[[Row], str], int]] = {
    "math500": ("math/math500", *MATH, 500),
    "aime24": ("math/aime24", *MATH, 30),
    "aime_1983_2023": ("math/aime_1983_2023_train", *MATH, 975),
    "amc": ("math/amc22_23", *MATH, 83),
    "olympiad": ("math/olympiad_bench", *MATH, 675),
    "gsm8k": ("gsm8k/test", "gsm8k", ["gsm8k", "gsm8k_format"], answer_block, 1319),
    "humaneval": ("humaneval/test", "humaneval", CODE, program, 164),
    "mbpp": ("mbpp/test", "mbpp", CODE, program, 500),
}
"""Name -> asset, format, rewards (the first says what is right), gold completion, rows."""

REWARDS = [
    {"name": "correct", "type": "math_correctness"},
    {"name": "gsm8k", "type": "gsm8k_correctness"},
    {"name": "gsm8k_format", "type": "gsm8k_format"},
    {"name": "pass_rate", "type": "code_pass_rate"},
    {"name": "bug_free", "type": "code_bug_free"},
]


def prepare(folder: Path, names: Sequence[str], limit: int | None) -> None:
    for name in names:
        asset, form, *_ = SETS[name]
        source = needed(f"data/{asset}.jsonl")
        with pytest.raises(SystemExit) as ended:
            arguments = ["data", "prepare", form, str(source), "--source", name]
            more = [] if limit is None else ["--limit", str(limit)]
            cli.main([*arguments, *more, "--output", str(folder / f"{name}.jsonl")])
        assert ended.value.code == 0


def config_of(folder: Path, names: Sequence[str]) -> Path:
    return write_config(
        folder,
        rewards=REWARDS,
        # Reference programs compute for seconds, and machines are busy.
        sandbox={"cpu_seconds": 60, "wall_seconds": 600},
        reward_suite={
            "num_workers": 1,
            "sample_timeout_seconds": 6000,
            "step_timeout_seconds": 6000,
        },
        eval={
            "max_completion_tokens": 16384,
            "format_reward": "gsm8k_format",
            "bug_reward": "bug_free",
            "sets": [
                {
                    "name": name,
                    "data": f"{name}.jsonl",
                    "rewards": SETS[name][2],
                    "correct": {"reward": SETS[name][2][0]},
                }
                for name in names
            ],
        },
    )


def results(folder: Path, model: str) -> dict[str, dict[str, Any]]:
    return json.loads((folder / f"run/eval/{model}/results.json").read_text())["sets"]


def check(folder: Path, names: Sequence[str], limit: int | None) -> None:
    """Evaluate both models on sets; each figure is exactly 1 or 0."""
    prepare(folder, names, limit)
    answers = {
        row["prompt"]: [SETS[name][3](row)]
        for name in names
        for row in read_jsonl(folder / f"{name}.jsonl")
    }
    save_answering_model(folder / "gold", answers)
    save_answering_model(folder / "nothing", {})
    path = config_of(folder, names)
    for model, value in (("gold", 1.0), ("nothing", 0.0)):
        assert evaluate(path, "--model.hf_path", model)
        found = results(folder, model)
        assert list(found) == list(names)
        for name, it in found.items():
            wrong = [
                record["prompt_id"]
                for record in read_jsonl(folder / f"run/eval/{model}/{name}.jsonl")
                if record["rewards"][SETS[name][2][0]] != value
            ]
            assert not wrong, f"{model} on {name}"
            assert it["num_prompts"] == min(limit or SETS[name][4], SETS[name][4])
            assert it["num_left_out"] == 0 and it["infrastructure_share"] == 0
            means = {key: quantity["mean"] for key, quantity in it["quantities"].items()}
            assert means["pass@1"] == means[f"reward/{SETS[name][2][0]}"] == value
            assert means["truncated_share"] == 0
            if "bug_free" in SETS[name][2]:
                assert means["bug_share"] == 1 - value
            if name == "gsm8k":
                assert means["format_share"] == value
            assert all(entry["num_invalid"] == 0 for entry in it["missing"].values())


def test_the_first_rows_of_each_set(tmp_path: Path):
    check(tmp_path, list(SETS), limit=4)


@pytest.mark.full
@pytest.mark.parametrize("name", SETS)
def test_whole_sets(tmp_path: Path, name: str):
    check(tmp_path, [name], limit=None)
