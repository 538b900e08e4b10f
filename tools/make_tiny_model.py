"""Makes the folder of a small model for a laptop: config and a tokenizer trained on given files.

    python tools/make_tiny_model.py --text-from rows.jsonl --vocab-size 3000 --output folder

The files are texts, or jsonl, of which every string is a text. Train it with `model.init: random`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gdpo_megatron.tiny_model import TinyShape, make_tiny_model


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a file; of jsonl, its strings, keys left out."""
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8")
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield from _strings(json.loads(line))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def main() -> None:
    """Command line."""
    shape = TinyShape()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--text-from", nargs="+", type=Path, required=True, metavar="FILE", help="texts or jsonl"
    )
    parser.add_argument("--vocab-size", type=int, default=3000, help="tokens, at most")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--hidden-size", type=int, default=shape.hidden_size, help="width")
    parser.add_argument("--num-layers", type=int, default=shape.num_layers, help="layers")
    parser.add_argument(
        "--max-positions", type=int, default=shape.max_positions, help="longest sequence, in tokens"
    )
    options = parser.parse_args()
    for path in options.text_from:
        if not path.is_file():
            parser.error(f"--text-from: no file {path}")
    shape = TinyShape(
        hidden_size=options.hidden_size,
        # Megatron's gated MLP in about the proportions of the large ones.
        intermediate_size=options.hidden_size * 7 // 2,
        num_layers=options.num_layers,
        max_positions=options.max_positions,
    )
    texts = (text for path in options.text_from for text in texts_of(path))
    size = make_tiny_model(options.output, texts, vocab_size=options.vocab_size, shape=shape)
    print(f"{options.output}: {size} tokens, {shape.num_layers} layers of {shape.hidden_size}")


if __name__ == "__main__":
    main()
