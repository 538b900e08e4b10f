"""Checks of `gdpo-megatron certify` on this rank, with a mistake in what they check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from rank_layouts import platform  # prepares Megatron, so it comes first

import rank_fp8  # isort: skip
from support.sabotage import SABOTAGES, wrong_heads

from gdpo_megatron.certify import fp8, logits, round_trip, sleep_wake, weight_sync
from gdpo_megatron.certify.engine_parts import EngineParts
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.policy.fp8_linear import Fp8Mode
from gdpo_megatron.rollout.native import NativeEngine

ONE_MODEL = {"qwen3_tied": logits.MODELS["qwen3_tied"]}


def slower_rotation() -> AbstractContextManager[Any]:
    """All positions are half of what they are."""
    original = ModelArchitecture.inverse_frequencies
    return mock.patch.object(
        ModelArchitecture, "inverse_frequencies", lambda self: original(self) / 2
    )


@contextmanager
def swapped_in_the_stream() -> Iterator[None]:
    """Gate and up projection change places on their way to the engine."""
    original = EngineParts.right

    def right(self: EngineParts) -> Any:
        with SABOTAGES["swapped"].policy(self.policy):
            return original(self)

    with mock.patch.object(EngineParts, "right", right):
        yield


@contextmanager
def keeps_its_weights() -> Iterator[None]:
    """An engine that sleeps without giving anything back, and wakes with new memory."""
    kept: list[Any] = []
    original = NativeEngine.sleep

    def sleep(self: NativeEngine) -> None:
        kept.append(self._decoder)
        original(self)

    with mock.patch.object(NativeEngine, "sleep", sleep):
        yield


def no_fp8() -> AbstractContextManager[Any]:
    """Layers that are said to multiply in FP8 and do not."""
    return mock.patch.object(Fp8Mode, "active", property(lambda _: False, lambda _, value: None))


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "logits": (logits, {"local": True}, nullcontext),
    "logits, slower rotation": (logits, {"local": True}, slower_rotation),
    "round_trip": (round_trip, {}, nullcontext),
    "round_trip, wrong heads": (round_trip, {}, lambda: wrong_heads(None)),
    "weight_sync": (weight_sync, {"engine": "native", "tp": 1}, nullcontext),
    "weight_sync, swapped": (weight_sync, {"engine": "native", "tp": 1}, swapped_in_the_stream),
    "sleep_wake": (sleep_wake, {"engine": "native"}, nullcontext),
    "sleep_wake, keeps weights": (sleep_wake, {"engine": "native"}, keeps_its_weights),
    "fp8": (fp8, {}, nullcontext),
    "fp8, wrong scale": (fp8, {}, rank_fp8.sabotaged_scale),
    "fp8, none": (fp8, {}, no_fp8),
}
"""Name -> check, its arguments, what is wrong with what it checks."""


def run(folder: str) -> dict[str, Any]:
    """What each case gives back, or {"error": what it raises}."""
    return {name: _case(Path(folder, str(i)), *it) for i, (name, it) in enumerate(CASES.items())}


def _case(folder: Path, check: Any, arguments: dict[str, Any], mistake: Any) -> dict[str, Any]:
    folder.mkdir()
    models = mock.patch.object(check, "MODELS", ONE_MODEL, create=True)
    with mistake(), models:
        try:
            return check.on_rank(platform, folder, **arguments)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
