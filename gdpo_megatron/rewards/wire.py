"""What travels between the suite, its pool and their workers: JSON, one message per line.

JSON and not pickle, because reading a pickle runs code: what a reward sends must never be able to
act in the trainer. Floats keep every bit. A job is two lines, a header and its samples; the pool
reads the header alone and hands the samples on as they are.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gdpo_megatron.rewards.base import NOT_APPLICABLE, Invalid, RewardResult, RewardSample
from gdpo_megatron.rewards.calls import cut

_REASON_CHARACTERS = 200
_DETAIL_CHARACTERS = 2000


def line(message: Mapping[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def encode_samples(samples: Sequence[RewardSample]) -> bytes:
    """Samples as a line.

    Raises:
        TypeError: metadata that JSON cannot hold, see `encode_metadata`.
    """
    rows = [
        {
            "completion": sample.completion,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "metadata": sample.metadata,
            "num_tokens": sample.num_tokens,
            "finish_reason": sample.finish_reason,
            "turns": sample.turns,
        }
        for sample in samples
    ]
    return json.dumps(rows, default=_as_text, separators=(",", ":")).encode() + b"\n"


def encode_metadata(metadata: Mapping[str, Any]) -> str:
    """Metadata as a reward will get it, in JSON: dates and decimals as text.

    Raises:
        TypeError: a value of another type, such as bytes.
    """
    return json.dumps(metadata, default=_as_text)


def decode_samples(text: bytes) -> list[RewardSample]:
    """The samples of a line."""
    return [RewardSample(**{**row, "turns": tuple(row["turns"])}) for row in json.loads(text)]


def encode_result(result: RewardResult) -> float | list[str] | None:
    """A result as JSON: a score, null where it does not apply, else what an Invalid says."""
    if isinstance(result, Invalid):
        reason, detail = result.reason, cut(result.detail, _DETAIL_CHARACTERS)
        texts = [cut(reason, _REASON_CHARACTERS), detail, result.traceback]
        # Half of a surrogate pair could not be written to the log.
        return [text.encode(errors="replace").decode() for text in texts]
    return None if result is NOT_APPLICABLE else result  # pyright: ignore[reportReturnType]


def decode_result(value: float | list[str] | None) -> RewardResult:
    """The result that `encode_result` was given."""
    if value is None:
        return NOT_APPLICABLE
    return Invalid(*value) if isinstance(value, list) else float(value)


def _as_text(value: object) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be given to a reward")
