"""The plan beside what the first step of a run took, on the run's own batch.

State is asked of the tensors, and activations are the largest sum of live ones between the start of
an update and its gradients, by the same means on every device (planning/measure.py). The plan is
made for the step's own lengths, not for the longest that the config allows, so that what is left is
the plan's error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.data.batching import MicroBatch
from gdpo_megatron.planning.activations import under_way
from gdpo_megatron.planning.job import Job, Shape
from gdpo_megatron.planning.machine import GPUS, Assumptions, gpu_of
from gdpo_megatron.planning.measure import LiveBytes, measured_state
from gdpo_megatron.planning.plan import plan_against_measured
from gdpo_megatron.planning.step_time import time_plan
from gdpo_megatron.planning.tables import in_bytes, table
from gdpo_megatron.platform import Platform

if TYPE_CHECKING:  # which import Megatron
    from gdpo_megatron.distributed.mesh import Mesh
    from gdpo_megatron.policy.megatron_policy import MegatronPolicy

Row = tuple[str, float, float, float]
"""(what, planned, measured, planned / measured - 1)."""

_TIMED = {"logprobs": ("logprobs", "reference")}
"""Phase of a run -> those of a plan that it is, where the name is not the same."""


@dataclass(frozen=True, slots=True)
class RankRows:
    """Of a rank.

    Args:
        place: which one.
        shape: of its largest micro-batches.
        row_tokens: in the mean, prompt and completion.
        rows: state, then activations where they are planned.
    """

    place: str
    shape: Shape
    row_tokens: float
    rows: list[Row]


class FirstStep:
    """Measures the first update of a start; afterwards it does nothing.

    Args:
        config: of the run.
        arch: of its model.
        mesh: the trainer's mesh.
        platform: the machine.
    """

    def __init__(
        self, config: RLConfig | SFTConfig, arch: ModelArchitecture, mesh: Mesh, platform: Platform
    ):
        self._job = Job(config=config, arch=arch, world_size=mesh.world_size)
        self._mesh, self._platform = mesh, platform
        self._waits = config.logging.compare_plan
        self._measured: RankRows | None = None

    @contextmanager
    def watch(self, policy: MegatronPolicy, batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Measure the update inside, if it is the first one."""
        if not self._waits:
            yield
            return
        self._waits = False
        live = LiveBytes()
        policy.around_gradients = lambda: live
        try:
            yield
        finally:
            del policy.around_gradients
        config, mesh, shape = self._job.config, self._mesh, self._shape_of(batches)
        measured: dict[str, float] = {**measured_state(policy)}
        if config.model.lora is None and config.precision.fp8 is None:
            measured["activations"] = live.peak  # the plan does not know those of the two
        place = f"rank {mesh.rank} (tp {mesh.tp_rank}, pp {mesh.pp_rank}, dp {mesh.dp_rank})"
        rows = plan_against_measured(self._job, measured, mesh.pp_rank, shape)
        taken = [n + 1 for it in batches for n in it.lengths[it.row_ids >= 0].tolist()]
        row_tokens = sum(taken) / max(1, len(taken))
        self._measured = RankRows(place, shape, row_tokens, rows)

    def report(self, seconds: Mapping[str, float], completion_tokens: float = 0.0) -> list[str]:
        """Lines for a person after the step that was watched, then none; collective.

        Args:
            seconds: phase -> seconds that this rank measured.
            completion_tokens: of the step's rollouts in the mean; a run without has none.
        """
        own, self._measured = self._measured, None
        if own is None:
            return []
        ranks: list[Any] = [None] * self._mesh.world_size
        dist.all_gather_object(ranks, own)
        return [*memory_lines(ranks), *self._time_lines(seconds, own.row_tokens, completion_tokens)]

    def _time_lines(
        self, seconds: Mapping[str, float], row_tokens: float, completion_tokens: float
    ) -> list[str]:
        name = self._platform.device_name
        kind = gpu_of(name)
        if kind is None:
            return [f"time: not planned, as planning/machine.py has no rates of '{name}'"]
        job, given = with_lengths(self._job, row_tokens, completion_tokens)
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self._mesh.world_size))
        planned = time_plan(job, GPUS[kind], per_node, given).phases
        rows: list[Row] = []
        for phase, measured in seconds.items():
            parts = [planned[it] for it in _TIMED.get(phase, (phase,)) if it in planned]
            if parts:
                rows.append((phase, sum(parts), measured, sum(parts) / measured - 1))
        cells = [(f"  {n}", f"{p:.3f}", f"{m:.3f}", f"{e:+.0%}") for n, p, m, e in rows]
        return table((f"time as of {kind}, assumed", "planned s", "measured s", "error"), cells)

    def _shape_of(self, batches: Sequence[MicroBatch]) -> Shape:
        """Of those that are under way at a time, where they are largest, in the mean."""
        job, packing = self._job, self._job.config.train.packing
        tokens = [it.tokens.numel() for it in batches]
        if packing:
            multiple = job.length_multiple
            tokens = [-(-int(it.lengths.sum()) // multiple) * multiple for it in batches]
        number = max(under_way(job, Shape(1, 1, len(batches), 1), self._mesh.pp_rank))
        windows = range(max(1, len(batches) - number + 1))
        first = max(windows, key=lambda at: sum(tokens[at : at + number]))
        there = batches[first : first + number]
        rows = 1 if packing else len(there[0].tokens)
        columns = round(sum(tokens[first : first + number]) / len(there) / rows)
        longest = max(int(it.lengths.max()) for it in there) if packing else columns
        return Shape(rows, columns, len(batches), longest)


def memory_lines(ranks: Sequence[RankRows]) -> list[str]:
    """The rank that holds the most, beside its plan; the largest errors of all."""
    fullest = max(ranks, key=lambda it: sum(row[2] for row in it.rows))
    shape, number = fullest.shape, fullest.shape.num_microbatches
    what = "a micro-batch" if number == 1 else f"{number} micro-batches, the largest"
    worst: dict[str, float] = {}
    for name, _, _, error in (row for rank in ranks for row in rank.rows):
        worst[name] = max(worst.get(name, 0.0), error, key=abs)
    cells = [
        (f"  {name}", in_bytes(planned), in_bytes(measured), f"{error:+.1%}", f"{worst[name]:+.1%}")
        for name, planned, measured, error in fullest.rows
    ]
    return [
        f"the plan beside the first update: {fullest.place}, the fullest of {len(ranks)}; "
        f"{what} of {shape.rows} x {shape.columns} tokens",
        *table(("memory", "planned", "measured", "error", "largest of all ranks"), cells),
    ]


def with_lengths(job: Job, row: float, completion: float) -> tuple[Job, Assumptions]:
    """The same job over rows of these lengths, and what is assumed of its time."""
    config, given = job.config, Assumptions()
    if isinstance(config, RLConfig):
        longest = config.rollout.max_completion_tokens
        room = max(1, config.model.max_sequence_length - longest)
        of_completion, of_prompt = completion / longest, (row - completion) / room
        return job, replace(given, completion_share=of_completion, prompt_share=of_prompt)
    model = replace(config.model, max_sequence_length=max(2, round(row)))
    return replace(job, config=replace(config, model=model)), given
