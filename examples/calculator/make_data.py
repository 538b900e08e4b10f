"""The calculator example's data set, tokenizer and model config, made by code from a seed.

A question like "What is 37 * 84 % 59?" is beyond a model of half a million parameters, and easy
with a calculator. The transcripts of the warm start are answered by the environment that training
uses. Most of them are bad examples on purpose: they do not call, write calls that cannot be read,
or copy numbers wrongly. The warm-started model does the same, and RL has something to find.

    sft.jsonl    prompt, completion   one turn each: what came before it, and the turn
    train.jsonl  prompt, answer       questions and results
    eval.jsonl   prompt, answer       held out: no question of it is in the other two
    model/       config, generation config and tokenizer; no weights
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdpo_megatron.environments.base import Task
from gdpo_megatron.environments.tools import ToolsEnvironment
from gdpo_megatron.tiny_model import TinyShape, make_tiny_model

NUM_TRANSCRIPTS, NUM_TRAIN, NUM_EVAL = 12288, 4096, 256
MAX_VOCAB_SIZE = 640
MAX_POSITIONS = 256
# Digits in twos: a model that copies a number copies few tokens, of a kind that it sees often.
PIECES = r"\p{N}{1,2}| ?[\p{L}_]+|\n+| ?[^\s\p{L}\p{N}_]+|[^\S\n]+"

# How often a transcript of the warm start does what.
NO_CALL = 0.5  # says that it does not know, and never calls
BROKEN_CALL = 0.25  # of the calls: one that cannot be read
WRONG_CALL = 0.15  # of the others: a wrong digit
GIVE_UP = 0.5  # after an error: does not know, instead of calling again
WRONG_COPY = 0.1  # of the answers after a result: a wrong digit
NUM_ANSWERS = 2  # rows for each result: to copy it is what the model is slowest to learn
UNKNOWN = "unknown"

_BREAK = (
    lambda call: call.replace('"}}', '"}'),
    lambda call: call.replace('"name": ', '"name" '),
    lambda call: call.replace('"}}', "}}"),
)

Message = Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """A question by the expression that answers it."""

    expression: str

    @property
    def result(self) -> str:
        """The right answer."""
        a, _, b, _, c = self.expression.split()
        return str(int(a) * int(b) % int(c))

    @property
    def prompt(self) -> list[Message]:
        """The chat so far."""
        return [{"role": "user", "content": f"What is {self.expression}?"}]


def draw_question(rng: random.Random) -> Question:
    """What is left of the product of two numbers, divided by a third one.

    Hard to do in one's head, and yet all numbers are one token each: what is to be copied stands at
    a fixed distance, which a small model learns soon.
    """
    a, b, c = (rng.randint(32, 99) for _ in range(3))
    return Question(f"{a} * {b} % {c}")


def render_call(expression: str) -> str:
    """A turn that calls the calculator."""
    call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return f"<tool_call>\n{call}\n</tool_call>"


def render_answer(result: str) -> str:
    """A turn that ends the conversation."""
    return f"<answer>{result}</answer>"


def draw_transcript(question: Question, rng: random.Random) -> list[tuple[list[Message], str]]:
    """A bad example, most of the time: each turn, with all that was before it."""
    environment = ToolsEnvironment(["calculator"])
    environment.reset(Task(prompt=question.prompt[0]["content"]))
    chat = question.prompt
    turns: list[tuple[list[Message], str]] = []
    turn = render_answer(UNKNOWN) if rng.random() < NO_CALL else _call(question, rng)
    while True:
        turns.append((chat, turn))
        step = environment.step(turn)
        if step.done:
            return turns
        chat = [
            *chat,
            {"role": "assistant", "content": turn},
            {"role": "tool", "content": step.observation},
        ]
        if step.rewards["used_tool"]:
            result = step.observation.splitlines()[1]
            return turns + [(chat, _answer(result, rng)) for _ in range(NUM_ANSWERS)]
        if rng.random() < GIVE_UP:
            turn = render_answer(UNKNOWN)
        else:
            turn = render_call(question.expression)


def _answer(result: str, rng: random.Random) -> str:
    wrong = rng.random() < WRONG_COPY
    return render_answer(_change_digit(result, rng) if wrong else result)


def _call(question: Question, rng: random.Random) -> str:
    if rng.random() < BROKEN_CALL:
        return rng.choice(_BREAK)(render_call(question.expression))
    words = question.expression.split()
    if rng.random() < WRONG_CALL:
        at = rng.choice((0, 2, 4))
        words[at] = _change_digit(words[at], rng)
    return render_call(" ".join(words))


def _change_digit(number: str, rng: random.Random) -> str:
    at = rng.choice([i for i, character in enumerate(number) if character.isdigit()])
    digit = rng.choice([it for it in "123456789" if it != number[at]])
    return number[:at] + digit + number[at + 1 :]


def make_calculator_data(folder: Path, seed: int) -> None:
    """Write the data set, the tokenizer and the model config; the same bytes for the same seed.

    Args:
        folder: created if needed; files of these names are replaced.
        seed: of all draws.
    """
    rng = random.Random(seed)
    held_out: dict[str, Question] = {}
    while len(held_out) < NUM_EVAL:
        question = draw_question(rng)
        held_out.setdefault(question.expression, question)

    def draw(number: int) -> list[Question]:
        questions: list[Question] = []
        while len(questions) < number:
            question = draw_question(rng)
            if question.expression not in held_out:
                questions.append(question)
        return questions

    rows = [row for it in draw(NUM_TRANSCRIPTS) for row in draw_transcript(it, rng)]
    train = draw(NUM_TRAIN)
    folder.mkdir(parents=True, exist_ok=True)
    _write_jsonl(folder / "sft.jsonl", ({"prompt": p, "completion": c} for p, c in rows))
    for name, questions in (("train", train), ("eval", held_out.values())):
        pairs = ({"prompt": it.prompt, "answer": it.result} for it in questions)
        _write_jsonl(folder / f"{name}.jsonl", pairs)
    texts = [message["content"] for prompt, _ in rows for message in prompt]
    texts += [completion for _, completion in rows]
    # Roles are in every conversation, and each group of digits is to be a token.
    texts += ["user", "assistant", "tool"] * len(rows)
    texts += [f"{number:0{width}}" for width in (1, 2) for number in range(10**width)] * 50
    make_tiny_model(
        folder / "model",
        texts,
        vocab_size=MAX_VOCAB_SIZE,
        shape=TinyShape(num_layers=2, max_positions=MAX_POSITIONS),
        pieces=PIECES,
    )


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--seed", type=int, default=1234, help="of all draws")
    arguments = parser.parse_args()
    make_calculator_data(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
