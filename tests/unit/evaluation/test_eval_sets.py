"""From the config's sections to sets: what is inherited, what is refused, what overlaps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.evaluation import CorrectConfig
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.evaluation.overlap import overlap_problems
from gdpo_megatron.evaluation.quantities import Estimate
from gdpo_megatron.evaluation.report import summarise
from gdpo_megatron.evaluation.sets import resolve_sets
from gdpo_megatron.observability.metrics import find_metric

REWARDS = [
    {"name": "right", "type": "math_correctness", "weight": 2.0},
    {
        "name": "short",
        "type": "length",
        "args": {"limit": 8},
        "when": {"reward": "right", "gte": 1},
    },
]


def load(folder: Path, section: Mapping[str, Any], *overrides: str, **data: str) -> RLConfig:
    config = {
        "run_dir": "run",
        "model": {"hf_path": "model", "max_sequence_length": 512},
        "data": data,
        "rewards": REWARDS,
        "eval": section,
    }
    path = folder / "config.yaml"
    path.write_text(yaml_text.dump(config))
    return load_config(RLConfig, path, overrides)


def problems(folder: Path, section: Mapping[str, Any], **data: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        resolve_sets(load(folder, section, **data))
    return caught.value.problems


def test_a_set_takes_what_it_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    section = {
        "temperature": 0.6,
        "top_p": 0.95,
        "max_completion_tokens": 100,
        "samples_per_prompt": 16,
        "num_prompts": 50,
        "exceed_tokens": 40,
        "stop": ["END"],
        "correct": {"reward": "right", "pass_at_k": [1, 8]},
        "rewards": [{"name": "also", "type": "contains", "args": {"keyword": "a"}}],
        "sets": [
            {"name": "plain", "data": "p.jsonl"},
            {
                "name": "own",
                "data": "o.jsonl",
                "temperature": 0.0,
                "samples_per_prompt": 1,
                "max_completion_tokens": 200,
                "num_prompts": 5,
                "exceed_tokens": 100,
                "stop": [],
                "prompt_key": "question",
                "rewards": ["also"],
                "correct": {"reward": "also"},
            },
            {"name": "unscored", "data": "u.jsonl", "rewards": ["also"]},
        ],
    }
    monkeypatch.setenv("SETS", "/sets")
    overrides = ("--eval.sets.plain.top_p", "0.5", "--eval.sets.own.data=$SETS/o.jsonl")
    config = load(tmp_path, section, *overrides, eval="e.jsonl")
    held_out, plain, own, unscored = resolve_sets(config)
    assert [it.name for it in (held_out, plain, own)] == ["data.eval", "plain", "own"]
    assert held_out.sampling.top_p == 0.95 and plain.sampling.top_p == 0.5
    assert plain.sampling.stop == ("END",) and own.sampling.stop == ()
    assert (plain.samples_per_prompt, plain.num_prompts, plain.exceed_tokens) == (16, 50, 40)
    assert (own.samples_per_prompt, own.num_prompts, own.exceed_tokens) == (1, 5, 100)
    assert own.sampling.temperature == 0 and own.room == 312
    assert (plain.path, own.path) == ("p.jsonl", "/sets/o.jsonl")
    assert own.data.prompt_key == "question" and plain.data.prompt_key == "prompt"
    assert plain.reward_names == held_out.reward_names == ("right", "short")
    assert own.reward_names == ("also",) and own.correct == CorrectConfig(reward="also")
    assert plain.correct == CorrectConfig(reward="right", pass_at_k=(1, 8))
    assert unscored.correct is None
    assert len({it.noise_stream for it in (held_out, plain, own, unscored)}) == 4


SET = {"name": "s", "data": "s.jsonl"}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"sets": [SET | {"rewards": ["rihgt"]}]},
            "eval.sets.s.rewards: no reward named 'rihgt'; did you mean 'right'?",
        ),
        ({"sets": [SET | {"rewards": []}]}, "eval.sets.s.rewards: at least one reward is needed"),
        (
            {"sets": [SET | {"rewards": ["short"]}]},
            "eval.sets.s.rewards: 'short' is conditioned on 'right', which must be in the list too",
        ),
        (
            {"sets": [SET | {"rewards": ["right"], "correct": {"reward": "short"}}]},
            "eval.sets.s.correct.reward: no reward of the set is named 'short'; choices: right",
        ),
        (
            {"correct": {"reward": "correct"}, "sets": [SET]},
            "eval.correct.reward: no reward named 'correct'; choices: right, short",
        ),
        (
            {"bug_reward": "bugs", "sets": [SET]},
            "eval.bug_reward: no reward named 'bugs'; choices: right, short",
        ),
        (
            {"rewards": [{"name": "right", "type": "length"}], "sets": [SET]},
            "eval.rewards.right: there is a reward of that name in `rewards`",
        ),
        (
            {"correct": {"reward": "right", "pass_at_k": [1, 8]}, "samples_per_prompt": 4,
             "sets": [SET]},
            "eval.sets.s.correct.pass_at_k: 8 is more than samples_per_prompt 4",
        ),
        (
            {"temperature": 0.0, "samples_per_prompt": 4, "sets": [SET]},
            "eval.sets.s.samples_per_prompt is 4, but with temperature 0 all samples of a prompt "
            "are equal; use 1",
        ),
        (
            {"label": "../up", "sets": [SET]},
            "eval.label is '../up', but names a folder: letters, digits, _, . and -",
        ),
        (
            {"exceed_tokens": 256, "sets": [SET]},
            "eval.sets.s.exceed_tokens is 256, but no completion is longer than "
            "max_completion_tokens 256",
        ),
        (
            {"sets": [SET | {"max_completion_tokens": 512}]},
            "eval.sets.s.max_completion_tokens 512 leaves no room for a prompt in "
            "model.max_sequence_length 512",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_set(tmp_path: Path, section: dict[str, Any], expected: str):
    assert problems(tmp_path, section) == [expected]


def test_names_are_files_and_metrics(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        load(tmp_path, {"sets": [SET, SET, SET | {"name": "../up"}]})
    assert caught.value.problems == [
        "eval.sets: name 's' is used 2 times",
        "eval.sets: name '../up' may only hold letters, digits, _ and -",
    ]


def write_rows(path: Path, *rows: Mapping[str, Any]) -> None:
    path.write_text("".join(f"{json.dumps({'answer': '1', **row})}\n" for row in rows))


def test_prompts_that_are_trained_on_are_told(tmp_path: Path):
    write_rows(
        tmp_path / "train.jsonl",
        {"id": "a", "prompt": "What is  1+1?"},
        {"id": "b", "prompt": [{"role": "user", "content": "Solve: q. Go."}], "problem": "q"},
        {"id": "c", "prompt": "else"},
    )
    write_rows(
        tmp_path / "s.jsonl",
        {"id": "x", "prompt": [{"role": "system", "content": "S"},
                               {"role": "user", "content": "what is 1+1?\n"}]},
        {"id": "y", "prompt": "Other words around it", "problem": "Q"},
        {"id": "z", "prompt": "what is 1+2?"},
    )  # fmt: skip
    config = load(tmp_path, {"sets": [SET]}, train="train.jsonl")
    (problem,) = overlap_problems(resolve_sets(config), config.data, tmp_path)
    assert problem == (
        f"{tmp_path}/s.jsonl: 2 of 3 prompts are in data.train ({tmp_path}/train.jsonl) too: "
        "'x' is 'a', 'y' is 'b'; take them out of one of the two, or set "
        "eval.allow_train_overlap: true"
    )
    write_rows(tmp_path / "s.jsonl", {"id": "z", "prompt": "what is 1+2?"})
    assert overlap_problems(resolve_sets(config), config.data, tmp_path) == []


def record(prompt: int, sample: int, right: float | None, why: str = "") -> dict[str, Any]:
    unscored = {} if right is not None else {"unscored": {"right": why}}
    return {
        "prompt_id": f"p{prompt}",
        "sample": sample,
        "num_tokens": 10,
        "finish_reason": "stop",
        "rewards": {"right": right},
        **unscored,
    }


def test_what_is_missing_is_counted_by_reason(tmp_path: Path):
    section = {
        "samples_per_prompt": 2,
        "correct": {"reward": "right"},
        "sets": [SET | {"rewards": ["right"]}],
    }
    config = load(tmp_path, section)
    (eval_set,) = resolve_sets(config)
    records = [
        record(0, 0, 1.0),
        record(0, 1, None, "sandbox: it broke"),
        record(1, 0, None, "not applicable"),
        record(1, 1, None, "not applicable"),
        record(2, 0, 0.0),
        record(2, 1, None, "raised ValueError: bad: worse"),
    ]
    result = summarise(
        eval_set,
        config.eval,
        records,
        identity={"data": {"sha256": "abc"}},
        num_left_out=1,
        events={"right": {"timeout": 2}},
        seed=1,
    )
    missing = result.missing["right"]
    assert (missing.num_invalid, missing.num_not_applicable) == (2, 2)
    assert missing.reasons == {"raised ValueError": 1, "sandbox": 1}
    assert result.infrastructure_share == pytest.approx(1 / 6)
    accuracy = result.estimates["pass@1"]
    assert (accuracy.mean, accuracy.num_prompts) == (0.5, 2)
    assert isinstance(accuracy, Estimate)
    metrics = result.metrics()
    assert metrics["eval/s/pass@1"] == 0.5 and metrics["eval/s/right/mean"] == 0.5
    assert metrics["eval/s/invalid_share"] == pytest.approx(2 / 6)
    for name in metrics:
        find_metric(name)
    assert json.loads(json.dumps(result.as_json()))["data"] == {"path": "s.jsonl", "sha256": "abc"}
    text = result.as_text()
    assert "s: 3 prompts x 2, T 1, top_p 1, at most 256 tokens" in text
    assert "right: 2 completions could not be judged: raised ValueError (1), sandbox (1)" in text
    assert "rows left out, their prompts being too long: 1" in text
