"""The quickstart's data set, tokenizer and model config, made by code from a seed.

The task is tool calling in miniature, in the output format of the paper's tool-calling task: a
request in plain words and three offered tools; the answer names the tool in a think block and calls
it with values copied from the request. The golds are right; the SFT rows are spoilt on purpose, so
that the warm-started model does the right thing only now and then and RL has something to find.

    sft.jsonl    prompt, completion   spoilt answers to imitate
    train.jsonl  prompt, answer       RL prompts with their golds
    eval.jsonl   prompt, answer       held out: no request of it is in the other two
    model/       config.json, generation_config.json and tokenizer files; no weights
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdpo_megatron.tiny_model import save_tokenizer, train_bpe, write_json

NUM_SFT, NUM_TRAIN, NUM_EVAL = 16384, 2048, 256
NUM_OFFERED = 3
MAX_VOCAB_SIZE = 1024
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
MAX_POSITIONS = 160

# How often an SFT answer is spoilt. The last three exclude each other, so 40 % keep the format.
WRONG_VALUE = 0.25
WRONG_NAME = 0.15
NO_THINK, UNCLOSED_THINK, UNCLOSED_CALL = 0.30, 0.15, 0.15

_WORDS = {
    "city": (
        "Paris London Tokyo Rome Cairo Oslo Lima Delhi Berlin Madrid Boston Dublin Vienna Athens "
        "Lisbon Prague Nairobi Seoul Sydney Denver"
    ),
    "unit": "celsius fahrenheit kelvin",
    "currency": "euro dollar yen pound peso rupee franc krona",
    "name": "Amy Bob Carol Dan Eve Frank Grace Hugo Ivy Jack Kate Leo Mia Nora Oscar Ruth",
    "text": "hello yes no later thanks sorry welcome goodbye hurry wait",
    "label": "gym lunch call meds work tea dinner school yoga swim",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "food": "pizza sushi tacos curry ramen salad soup pasta",
    "item": "milk bread eggs rice apples cheese beans onions lemons nuts",
    "music": "jazz rock pop blues folk techno opera swing",
    "room": "kitchen bedroom office hall garage bathroom attic cellar",
    "color": "red blue green white purple orange yellow pink",
    "language": "french german spanish italian japanese polish greek latin",
}
VALUES: dict[str, list[Any]] = {
    **{kind: list(words.split()) for kind, words in _WORDS.items()},
    "count": list(range(2, 13)),
    "amount": list(range(10, 100, 5)),
}


@dataclass(frozen=True)
class Tool:
    """A tool: parameter name -> key of VALUES, and ways to ask for it."""

    parameters: dict[str, str]
    requests: tuple[str, ...]


TOOLS: dict[str, Tool] = {
    "get_weather": Tool(
        {"city": "city", "unit": "unit"},
        ("weather in {city} in {unit}", "in {unit}, how warm is {city}"),
    ),
    "find_event": Tool(
        {"city": "city", "day": "day"},
        ("what is on in {city} on {day}", "on {day} I am in {city}, any shows"),
    ),
    "convert": Tool(
        {"amount": "amount", "source": "currency", "target": "currency"},
        ("change {amount} {source} to {target}", "how much {target} is {amount} {source}"),
    ),
    "book_table": Tool(
        {"people": "count", "food": "food", "day": "day"},
        ("table for {people} on {day} with {food}", "we are {people} and want {food} on {day}"),
    ),
    "set_alarm": Tool(
        {"hour": "count", "label": "label"},
        ("wake me at {hour} for {label}", "alarm for {label} at {hour}"),
    ),
    "send_message": Tool(
        {"to": "name", "text": "text"}, ("tell {to} {text}", "say {text} to {to}")
    ),
    "play_music": Tool(
        {"style": "music", "room": "room"},
        ("play {style} in the {room}", "let the {room} hear {style}"),
    ),
    "find_flight": Tool(
        {"origin": "city", "target": "city", "day": "day"},
        ("fly from {origin} to {target} on {day}", "on {day} to {target}, from {origin}"),
    ),
    "buy_food": Tool(
        {"item": "item", "count": "count"}, ("buy {count} {item}", "we need {item}, get {count}")
    ),
    "set_light": Tool(
        {"room": "room", "color": "color"},
        ("make the {room} light {color}", "{color} light in the {room}"),
    ),
    "translate": Tool(
        {"text": "text", "language": "language"},
        ("what is {text} in {language}", "put {text} into {language}"),
    ),
    "add_event": Tool(
        {"label": "label", "day": "day", "hour": "count"},
        ("{label} on {day} at {hour}", "on {day} I have {label} at {hour}"),
    ),
}


@dataclass(frozen=True)
class Example:
    """One request with the tools offered for it, and the right call."""

    request: str
    offered: tuple[str, ...]
    name: str
    arguments: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The text given to the model."""
        tools = "".join(f"\n{_signature(name)}" for name in self.offered)
        return f"{self.request}{tools}\n"

    @property
    def gold(self) -> str:
        """The right answer."""
        return render_answer(self.name, self.arguments)


def _signature(name: str) -> str:
    types = {
        key: "int" if isinstance(VALUES[kind][0], int) else "str"
        for key, kind in TOOLS[name].parameters.items()
    }
    return f"{name}({', '.join(f'{key}:{kind}' for key, kind in types.items())})"


def render_answer(name: str, arguments: dict[str, Any]) -> str:
    """Write a call in the paper's output format."""
    call = json.dumps({"name": name, "parameters": arguments})
    return f"<think>use {name}</think>\n<tool_call>\n{call}\n</tool_call>"


def draw_example(rng: random.Random) -> Example:
    """Draw a request; its values are all different."""
    name = rng.choice(list(TOOLS))
    tool = TOOLS[name]
    arguments: dict[str, Any] = {}
    for key, kind in tool.parameters.items():
        choices = [value for value in VALUES[kind] if value not in arguments.values()]
        arguments[key] = rng.choice(choices)
    others = rng.sample([other for other in TOOLS if other != name], NUM_OFFERED - 1)
    offered = [name, *others]
    rng.shuffle(offered)
    request = rng.choice(tool.requests).format(**arguments)
    return Example(request, tuple(offered), name, arguments)


def spoil(example: Example, rng: random.Random) -> str:
    """Return the answer with the faults that RL is to remove."""
    arguments = {
        key: rng.choice(VALUES[TOOLS[example.name].parameters[key]])
        if rng.random() < WRONG_VALUE
        else value
        for key, value in example.arguments.items()
    }
    name = example.name
    if rng.random() < WRONG_NAME:
        name = rng.choice([offered for offered in example.offered if offered != name])
    answer = render_answer(name, arguments)
    fault = rng.random()
    if fault < NO_THINK:
        return answer[answer.index("<tool_call>") :]
    if fault < NO_THINK + UNCLOSED_THINK:
        return answer.replace("</think>", "")
    if fault < NO_THINK + UNCLOSED_THINK + UNCLOSED_CALL:
        return answer.removesuffix("\n</tool_call>")
    return answer


def make_quickstart_data(folder: Path, seed: int) -> None:
    """Write the data set, the tokenizer and the model config; the same bytes for the same seed.

    Args:
        folder: created if needed; files of these names are replaced.
        seed: of all draws.
    """
    rng = random.Random(seed)
    held_out: dict[str, Example] = {}
    while len(held_out) < NUM_EVAL:
        example = draw_example(rng)
        held_out.setdefault(example.request, example)

    def draw(number: int) -> list[Example]:
        rows: list[Example] = []
        while len(rows) < number:
            example = draw_example(rng)
            if example.request not in held_out:
                rows.append(example)
        return rows

    sft_rows = [(example.prompt, spoil(example, rng)) for example in draw(NUM_SFT)]
    train = draw(NUM_TRAIN)

    folder.mkdir(parents=True, exist_ok=True)
    _write_jsonl(folder / "sft.jsonl", ({"prompt": p, "completion": c} for p, c in sft_rows))
    for name, examples in (("train", train), ("eval", held_out.values())):
        rows = ({"prompt": example.prompt, "answer": example.gold} for example in examples)
        _write_jsonl(folder / f"{name}.jsonl", rows)
    model_folder = folder / "model"
    model_folder.mkdir(exist_ok=True)
    vocab_size = _write_tokenizer(model_folder, [text for row in sft_rows for text in row])
    _write_model_config(model_folder, vocab_size)


def _write_tokenizer(folder: Path, texts: list[str]) -> int:
    """Train a byte-level BPE on `texts`, write its files, return the size of its vocabulary."""
    from tokenizers import processors

    # A word, number or tag is cut off from the punctuation and spaces around it, so that a value
    # is the same tokens in the request, behind a space, and in the call, behind a quote.
    pieces = r"</?\w+>|:\w+|\w+|\n|[^\w\n<]+|<"
    tokenizer = train_bpe(
        texts, vocab_size=MAX_VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, pieces=pieces
    )
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, SPECIAL_TOKENS.index(bos))]
    )
    save_tokenizer(
        tokenizer,
        folder,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=MAX_POSITIONS,
    )
    return tokenizer.get_vocab_size()


def _write_model_config(folder: Path, vocab_size: int) -> None:
    special = {f"{token.strip('<>')}_token_id": i for i, token in enumerate(SPECIAL_TOKENS)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.04,
        "torch_dtype": "float32",
        **special,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special)


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
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
    make_quickstart_data(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
