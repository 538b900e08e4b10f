"""What a config section is: a frozen dataclass whose fields are checked and documented.

pydantic does the checking: types, ranges and unknown keys are all reported together. The string
below each field is its documentation, in the code, in `--help` and in the docs alike.
"""

from __future__ import annotations

from typing import Annotated, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as _pydantic_dataclass

T = TypeVar("T")

_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, validated config section."""
    return _pydantic_dataclass(cls, frozen=True, kw_only=True, config=_CONFIG)  # pyright: ignore


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
