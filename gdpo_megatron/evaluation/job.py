"""The `eval` job: evaluates the model of a config, wherever it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from gdpo_megatron.build import Parts
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.evaluation.evaluator import RESULTS_FILE, Evaluator
from gdpo_megatron.evaluation.loaded import evaluation_folder, label_of
from gdpo_megatron.evaluation.report import as_table
from gdpo_megatron.interrupt import Interrupt
from gdpo_megatron.observability.progress import ProgressDisplay
from gdpo_megatron.rollout.stall import StallLimit, StallWatch


class DigestedWeights:
    """A model's weights, and the SHA-256 of names and bytes of those that were drawn."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        reader = self._parts.reader()
        for name in hf_shapes(self._parts.arch):
            tensor = reader.get(name)
            self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            self._digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
            yield name, tensor

    def hexdigest(self) -> str:
        """In hexadecimal digits; of the whole model once it was drawn."""
        return self._digest.hexdigest()


def run_eval(config: RLConfig, base_dir: Path, parts: Parts) -> bool:
    """Evaluate the model of the config; rank 0 writes and prints the results.

    Returns:
        Whether the evaluation is complete; False when it was interrupted.

    Raises:
        TooManyInvalid: a reward is broken.
        InputError: what is on disk under the same label was made with something else.
    """
    engine, engines = parts.engine(config.rollout, config.eval.max_concurrent_sequences)
    run_dir = resolve_path(base_dir, config.run_dir)
    environment = parts.environment(config.rollout, config.sandbox, engines, run_dir)
    stall = StallLimit(
        seconds=config.rollout.stall_timeout_seconds,
        folder=run_dir,
        goes_on=lambda: "the same command goes on after the last chunk that is on disk",
    )
    evaluator = Evaluator(config, base_dir, parts, engine, engines, stall, environment)
    interrupt, leads = Interrupt(parts.platform), parts.mesh.rank == 0
    label, title = label_of(config, base_dir), f"gdpo-megatron eval: {parts.folder}"
    chunks_of: dict[str, int] = {}
    with (
        environment or nullcontext(),
        ProgressDisplay(evaluator.num_chunks, 0, title, unit="chunk", enabled=leads) as display,
    ):
        display.phase("load")
        weights = DigestedWeights(parts)
        with StallWatch(engine, stall, parts.mesh.rank) as watch:
            with watch.call("no progress of wake"):
                engine.wake()
            with watch.call("no progress of load_weights"):
                engine.load_weights(watch.outside(iter(weights)), 0)

        def on_chunk(name: str, number: int) -> None:
            display.phase(name)
            chunks_of[name] = number
            if number:
                display.step_done(sum(chunks_of.values()), {})

        evaluation = evaluator.run(
            label,
            {"model": str(parts.folder)},
            weights=weights.hexdigest(),
            goes_on=True,
            on_progress=display.progress,
            on_chunk=on_chunk,
            is_over=interrupt.agreed,
        )
    if evaluation.broken is not None:
        raise evaluation.broken
    if leads:
        where = evaluation_folder(config, base_dir, label)
        if evaluation.results:
            print(as_table(evaluation.results), flush=True)
            print(f"written to {where / RESULTS_FILE}", flush=True)
        if not evaluation.is_complete:
            print("interrupted; the same command goes on after the last chunk", flush=True)
    return evaluation.is_complete
