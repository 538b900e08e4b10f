"""Import, log-probs, three updates and export of a tiny model in a layout, on this rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from gdpo_megatron.platform import Platform, detect_platform

platform: Platform = detect_platform()
platform.prepare_megatron()

import rank_mutants  # noqa: E402

from gdpo_megatron.certify import layout_run  # noqa: E402

in_layout: Callable[..., AbstractContextManager[dict[str, Any]]] = partial(
    layout_run.in_layout, platform
)


def run(models: str, cases: list[dict[str, Any]], engine: list[Any]) -> list[dict[str, Any]]:
    """Run cases one after the other.

    Args:
        models: folder of the models.
        cases: each with "model", "layout" (arguments of `in_layout`), "dtype", "mutant" and the
            number of "updates"; "batching" are keys of `train` where they are not the usual ones.
        engine: for each model, the log-probs that the engine is said to have had, by sample.
    """
    results = []
    for case in cases:
        model = case["model"]
        with in_layout(**case["layout"]) as layout, rank_mutants.MUTANTS[case["mutant"]]():
            results.append(
                layout_run.run_updates(
                    Path(models),
                    model,
                    layout,
                    engine[model],
                    dtype=case["dtype"],
                    updates=case["updates"],
                    batching=case.get("batching"),
                )
            )
    return results
