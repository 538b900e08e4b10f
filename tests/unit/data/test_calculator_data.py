"""The calculator example's data: golds, bad examples as often as said, and the tokens of a rollout.

Not covered: that a model learns it (tests/e2e/test_calculator_flow.py).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gdpo_megatron.data.chat_turns import ObservationEncoder
from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.environments.tools import calculator
from gdpo_megatron.environments.tools.calls import Call, read_calls

SCRIPT = Path(__file__).resolve().parents[3] / "examples/calculator/make_data.py"


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calculator_make_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["calculator_make_data"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(make_data: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calculator")
    make_data.make_calculator_data(folder, 1234)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "model")


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_seed_gives_the_same_bytes(make_data: ModuleType, folder: Path, tmp_path: Path):
    make_data.make_calculator_data(tmp_path / "again", 1234)
    assert contents(tmp_path / "again") == contents(folder)
    make_data.make_calculator_data(tmp_path / "other", 1)
    assert contents(tmp_path / "other")["eval.jsonl"] != contents(folder)["eval.jsonl"]


def test_golds_are_what_the_calculator_says(make_data: ModuleType, folder: Path):
    assert make_data.Question("37 * 84 % 59").result == "40"
    assert make_data.Question("34 * 34 % 34").result == "0"
    for row in read(folder, "sft"):
        for message in row["prompt"][1:2]:
            for call in read_calls(message["content"], "tool_call"):
                if isinstance(call, Call):
                    result = calculator.calculate(call.arguments["expression"])
                    assert row["prompt"][2]["content"] == (
                        f"<tool_response>\n{result}\n</tool_response>"
                    )


def test_eval_is_held_out(folder: Path):
    questions = {
        name: {row["prompt"][0]["content"] for row in read(folder, name)}
        for name in ("sft", "train", "eval")
    }
    assert len(read(folder, "eval")) == 256
    assert not questions["eval"] & (questions["sft"] | questions["train"])


def test_transcripts_are_as_bad_as_said(make_data: ModuleType, folder: Path):
    """Four standard errors of a share of 6,000 are at most 4 * sqrt(0.25 / 6000) = 0.026."""
    rows = read(folder, "sft")
    first = [row for row in rows if len(row["prompt"]) == 1]
    assert len(first) == make_data.NUM_TRANSCRIPTS
    kinds: Counter[str] = Counter()
    for row in first:
        calls = read_calls(row["completion"], "tool_call")
        kinds["none" if not calls else "good" if isinstance(calls[0], Call) else "broken"] += 1
    assert kinds["none"] / len(first) == pytest.approx(0.5, abs=0.026)
    num_calls = len(first) - kinds["none"]
    assert kinds["broken"] / num_calls == pytest.approx(0.25, abs=0.026)
    after_result = [row for row in rows if row["prompt"][-1]["content"][16:17] in "-0123456789"]
    after_result = [row for row in after_result if len(row["prompt"]) == 3]
    copied = [
        row["completion"] == f"<answer>{row['prompt'][-1]['content'].splitlines()[1]}</answer>"
        for row in after_result
    ]
    assert sum(copied) / len(copied) == pytest.approx(0.9, abs=0.026)
    gave_up = [row for row in rows if "Error" in row["prompt"][-1]["content"]]
    share = sum("unknown" in row["completion"] for row in gave_up) / len(gave_up)
    assert share == pytest.approx(0.5, abs=4 * (0.25 / len(gave_up)) ** 0.5)


def test_the_warm_start_sees_the_tokens_of_rollouts(folder: Path, tokenizer: Tokenizer):
    """What training strings together, turn by turn, is what the chat template makes of it all."""
    encoder = ObservationEncoder(tokenizer, role="tool", max_tokens=512)
    several = [row for row in read(folder, "sft") if len(row["prompt"]) > 1][:500]
    assert {len(row["prompt"]) for row in several} == {3, 5}
    for row in several:
        question, *turns = row["prompt"]
        token_ids = tokenizer.apply_chat_template([question])
        for turn, observation in zip(turns[::2], turns[1::2], strict=True):
            token_ids += tokenizer.encode(turn["content"], add_special_tokens=False)
            token_ids.append(tokenizer.eos_token_id or 0)
            token_ids += encoder.encode(observation["content"], token_ids[-1])[0]
        assert token_ids == tokenizer.apply_chat_template(row["prompt"])


def test_texts_survive_the_tokenizer_and_fit(folder: Path, tokenizer: Tokenizer):
    assert tokenizer.vocab_size <= 640
    for row in read(folder, "sft")[:2000]:
        assert tokenizer.decode(tokenizer.encode(row["completion"])) == row["completion"]
        length = len(tokenizer.apply_chat_template(row["prompt"]))
        assert length + len(tokenizer.encode(row["completion"])) < 160


def test_two_digits_are_one_token(tokenizer: Tokenizer):
    for text in [f"{number:02}" for number in range(100)] + [f"{digit}" for digit in range(10)]:
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1
    assert len(tokenizer.encode("3123", add_special_tokens=False)) == 2
