"""What readers and writers of both formats ask alike."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gdpo_megatron.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What checkpoints are written in."""

_MAX_PROBLEMS = 20


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` and so on, as config.json has it."""
    return str(dtype).removeprefix("torch.")


def num_non_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    # One pass without a copy: NaN goes through minimum and maximum.
    low, high = torch.aminmax(tensor)
    if low.isfinite() and high.isfinite():
        return 0
    return int((~tensor.isfinite()).sum())


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def refuse(problems: list[str], folder: Path) -> None:
    """Raise an InputError of the problems, if there are any, and not of thousands."""
    if problems:
        more = len(problems) - _MAX_PROBLEMS
        rest = [f"{folder}: {more} more problems"] if more > 0 else []
        raise InputError(problems[:_MAX_PROBLEMS] + rest)
