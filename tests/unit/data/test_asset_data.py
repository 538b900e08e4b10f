"""The data sets under $GDPO_ASSETS/data through their formats: all rows in, none lost.

Not covered: sets that are not there (the full ToolRL, DeepScaleR and Eurus sets).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.assets import needed

from gdpo_megatron.data.check import check_prepared
from gdpo_megatron.data.prepare import Prepared, prepare
from gdpo_megatron.data.row_pipeline import PrepareOptions
from gdpo_megatron.rewards.builtin import gsm8k, tool_call
from gdpo_megatron.rewards.builtin.code_tests import parse_tests

# Rows as the sets' own descriptions have them; what is set aside is looked at below.
SETS: list[tuple[str, str, int, dict[str, int]]] = [
    ("toolrl", "toolrl/train.jsonl", 382, {}),
    ("toolrl", "toolrl/test.jsonl", 80, {}),
    ("toolrl", "toolrl/test.parquet", 80, {}),
    ("gsm8k", "gsm8k/train.jsonl", 7473, {}),
    ("gsm8k", "gsm8k/test.jsonl", 1319, {}),
    ("math", "math/math500.jsonl", 500, {}),
    ("math", "math/aime_1983_2023_train.jsonl", 975, {}),
    ("math", "math/aime24.jsonl", 30, {}),
    ("math", "math/amc22_23.jsonl", 83, {}),
    ("math", "math/olympiad_bench.jsonl", 675, {}),
    ("code", "code_contests_small/train.jsonl", 125, {}),
    ("humaneval", "humaneval/test.jsonl", 164, {}),
    ("mbpp", "mbpp/train.jsonl", 374, {}),
    ("mbpp", "mbpp/validation.jsonl", 90, {}),
    ("mbpp", "mbpp/test.jsonl", 500, {}),
    ("mbpp", "mbpp/prompt.jsonl", 10, {}),
    # Two rows without an answer, one that is there twice.
    ("math", "math/train.jsonl", 7474, {"bad_answer": 2, "duplicate_prompt": 1}),
]


def prepared(folder: Path, format: str, *names: str, **options) -> Prepared:
    inputs = tuple(needed(f"data/{name}") for name in names)
    out = folder / f"{names[0].replace('/', '_')}.jsonl"
    return prepare(PrepareOptions(format=format, inputs=inputs, output=out, **options))


def rows_of(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("format", "name", "num_rows", "set_aside"), SETS)
def test_all_rows(tmp_path: Path, format: str, name: str, num_rows: int, set_aside: dict[str, int]):
    done = prepared(tmp_path, format, name)
    assert done.manifest["num_rows"] == num_rows
    assert done.manifest["set_aside"] == set_aside
    assert done.manifest["num_repaired"] == 0
    report = check_prepared(done.output)
    assert report.good and report.num_rows == num_rows - sum(set_aside.values())
    assert len(rows_of(done.rejected)) == sum(set_aside.values())


def test_answers_are_what_rewards_read(tmp_path: Path):
    """A right completion made of each row earns the full reward, or the tests are all there."""
    for row in rows_of(prepared(tmp_path, "gsm8k", "gsm8k/test.jsonl").output):
        completion = f"<think></think>\n<answer>{row['answer']}</answer>"
        assert gsm8k.correctness_reward(completion, row["answer"]) == 1.0
        assert row["solution"].endswith(f"#### {row['answer']}")
    scores = [
        tool_call.correctness_reward(row["answer"], row["answer"])
        for row in rows_of(prepared(tmp_path, "toolrl", "toolrl/test.jsonl").output)
    ]
    assert (scores.count(3.0), scores.count(0.0)) == (71, 9)
    rows = rows_of(prepared(tmp_path, "code", "code_contests_small/train.jsonl").output)
    counts = sorted(len(parse_tests(row["answer"]).tests) for row in rows)
    assert (counts[0], counts[len(counts) // 2], counts[-1]) == (1, 4, 138)


def test_competitions_hold_problems_of_math500(tmp_path: Path):
    """Three AIME problems are in MATH-500 word for word, three more in most of their words."""
    against = prepared(tmp_path, "math", "math/math500.jsonl", source="math500").output
    name = "math/aime_1983_2023_train.jsonl"
    done = prepared(tmp_path, "math", name, against=(against,))
    assert done.manifest["set_aside"] == {"leak": 6}
    details = [row["detail"] for row in rows_of(done.rejected)]
    assert sum(detail.startswith("equal to") for detail in details) == 3
    again = prepared(tmp_path, "math", name, against=(against,), allow_leaks=True, overwrite=True)
    assert again.manifest["num_written"] == 975
    assert len(again.manifest["allowed_leaks"]) == 6
