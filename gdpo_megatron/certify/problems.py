"""Word problems in GSM8K's form, made by code, and a small model for them.

The answers to imitate are GSM8K's form as the rewards read it, half of them spoilt in a way that a
reward sees, so that rewards differ within a group and there is something left to learn.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gdpo_megatron.config import yaml_text
from gdpo_megatron.tiny_model import TinyShape, make_tiny_model

NUM_ROWS = 512
MAX_COMPLETION_TOKENS = 32
MAX_SEQUENCE_LENGTH = 96
REWARDS = ("correctness", "integer", "format")
"""GSM8K's, of the paper's demo; each 0 or 1."""

_SHAPE = TinyShape(hidden_size=64, num_layers=4, intermediate_size=192, max_positions=128)
_NAMES = ("Ann", "Ben", "Eva", "Tom")
_THINGS = ("apples", "books", "coins", "pens")
_TWISTS = {
    "gets": ("more", 1),
    "loses": ("of them", -1),
}


def make_rows(seed: int) -> list[dict[str, Any]]:
    """Rows with prompt, answer, and a completion to imitate.

    Args:
        seed: of numbers and words.
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(NUM_ROWS):
        verb, (rest, sign) = draw.choice(list(_TWISTS.items()))
        b = draw.randint(1, 4)
        a = draw.randint(b, 5)
        name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
        answer = a + sign * b
        prompt = f"{name} has {a} {thing} and {verb} {b} {rest}. How many {thing}?\n"
        rows.append(
            {"prompt": prompt, "answer": str(answer), "completion": _completion(answer, number)}
        )
    return rows


def _completion(answer: int, number: int) -> str:
    """Right for every other row; the rest lacks a tag or adds a word to the number."""
    thought = f"<think>That makes {answer}."
    if number % 4 == 1:
        return f"{thought}\n<answer>{answer}</answer>"
    if number % 4 == 3:
        return f"{thought}</think>\n<answer>{answer} in all</answer>"
    return f"{thought}</think>\n<answer>{answer}</answer>"


def write_problems(folder: Path, seed: int = 0) -> None:
    """Write train.jsonl, sft.jsonl and the folder `model`, which has no weights."""
    rows = make_rows(seed)
    texts = [row["prompt"] + row["completion"] for row in rows]
    make_tiny_model(folder / "model", texts, vocab_size=512, shape=_SHAPE)
    for name, second in (("train", "answer"), ("sft", "completion")):
        lines = (json.dumps({key: row[key] for key in ("prompt", second)}) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a run's YAML file."""
    path.write_text(yaml_text.dump(config), encoding="utf-8")
    return path


def gsm8k_rewards() -> list[dict[str, str]]:
    """The `rewards` section of a run on GSM8K."""
    return [{"name": name, "type": f"gsm8k_{name}"} for name in REWARDS]
