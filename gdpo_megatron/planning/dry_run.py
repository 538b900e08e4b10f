"""The whole world on one machine: the real model of any rank, a real step of it, nothing computed.

A rank of a world of thousands is this process (platform/fake.py). The policy is built by the run's
own code, takes fake weights through the run's own mapping, whose shapes are so checked, and goes
through the phases of a step: weight sync, log-probs, update, with Megatron's schedule. What is
recorded are the messages that this rank would send, and the bytes that are alive.

`shard_sums` builds the model of every different place of the layout and counts: what all of them
hold together has to be the model, each parameter once.

Layers are those of the local spec, as on a CPU. Where Transformer Engine is installed a run takes
its layers: the same parameters, the same messages, other activations.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gdpo_megatron.planning.job import Job
from gdpo_megatron.planning.measure import measured_state
from gdpo_megatron.platform.fake import FakePlatform, Message, World, fake_world

_PLATFORM = FakePlatform()
_PLATFORM.prepare_megatron()

# Megatron must be prepared before these import it.
import torch  # noqa: E402

from gdpo_megatron.algorithms import needs_old_pass, needs_reference  # noqa: E402
from gdpo_megatron.config.schema import RLConfig  # noqa: E402
from gdpo_megatron.conversion.architecture import ModelArchitecture  # noqa: E402
from gdpo_megatron.conversion.mapping import hf_shapes, mapping_rows  # noqa: E402
from gdpo_megatron.distributed import mesh as meshes  # noqa: E402
from gdpo_megatron.distributed.mesh import Mesh  # noqa: E402
from gdpo_megatron.policy.megatron_policy import MegatronPolicy  # noqa: E402
from gdpo_megatron.policy.model import MegatronModel  # noqa: E402
from gdpo_megatron.policy.optimizer import materialize_state  # noqa: E402
from gdpo_megatron.policy.swapped import SwappedReference  # noqa: E402
from gdpo_megatron.sft import CrossEntropy  # noqa: E402
from gdpo_megatron.types import Prompt  # noqa: E402
from gdpo_megatron.update import (  # noqa: E402
    MinibatchPlan,
    PolicyLoss,
    rollout_micro_batches,
)


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's place in the layout."""

    rank: int
    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    etp: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Messages of one kind in a phase.

    Args:
        kind: see platform.fake.Message.
        group: name of the group: "tp", "dp-cp", ...; of send and recv "next" or "previous" stage.
        group_size: ranks of it.
        num_bytes: of one message.
        count: how often.
    """

    kind: str
    group: str
    group_size: int
    num_bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """What a rank did in one phase.

    Args:
        name: of the phase, as in the metrics.
        traffic: what it sent.
        held_bytes: alive before it, of everything.
        peak_bytes: at most during it, on top.
        seconds: that the recording took.
    """

    name: str
    traffic: tuple[Traffic, ...]
    held_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """A rank of the world.

    Args:
        place: in the layout.
        num_parameters: that it holds, padding of the vocabulary included.
        parameter_bytes: of its model, in Megatron's buffers where it has some.
        gradient_bytes: of Megatron's buffers.
        optimizer_bytes: of main weights and both moments.
        num_microbatches: that the update was run with.
        config_microbatches: that the config asks for.
        shape: rows and columns of a micro-batch.
        phases: of a step, in order.
    """

    place: Place
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    num_microbatches: int
    config_microbatches: int
    shape: tuple[int, int]
    phases: tuple[PhaseRecord, ...]


class FakeWeights:
    """Tensors of the model's names and shapes, without values."""

    def __init__(self, arch: ModelArchitecture):
        self._shapes = hf_shapes(arch)

    def get(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name])


def dry_run(job: Job, rank: int, *, max_microbatches: int | None = None) -> RankRecord:
    """Be one rank for one step.

    Args:
        job: that fits its world (see job_problems).
        rank: from 0 to the world's size - 1.
        max_microbatches: run no more than so many; None takes as many as fill the pipeline, after
            which its schedule repeats itself.
    """
    with fake_world(rank, job.world_size) as world:
        mesh = meshes.initialize(job.config.parallel, _PLATFORM)
        fill = job.pp if job.vp == 1 else 2 * job.pp
        return _Step(job, world, mesh, max_microbatches or fill).run()


class _Step:
    """One step of one rank, phase by phase."""

    def __init__(self, job: Job, world: World, mesh: Mesh, max_microbatches: int):
        self.job, self.world, self.mesh = job, world, mesh
        self._names = meshes.group_names()
        config, shape = job.config, job.shape()
        self.model_kwargs: dict[str, Any] = {
            "parallel": config.parallel,
            "precision": config.precision,
            "memory": config.memory,
            "max_sequence_length": config.model.max_sequence_length,
            "packing": config.train.packing,
            "mesh": mesh,
            "platform": _PLATFORM,
        }
        self.policy = MegatronPolicy(
            job.arch,
            optimizer=config.optimizer,
            total_updates=10,
            make_reader=lambda: FakeWeights(job.arch),
            lora=config.model.lora,
            **self.model_kwargs,
        )
        self.num_microbatches = min(shape.num_microbatches, max(max_microbatches, job.pp))
        sequence_parts = job.cp * (job.tp if config.parallel.sequence_parallel else 1)
        world.pipeline_shape = (shape.columns // sequence_parts, shape.rows, job.arch.hidden_size)
        self.phases: list[PhaseRecord] = []

    def run(self) -> RankRecord:
        config, shape = self.job.config, self.job.shape()
        held = measured_state(self.policy)
        materialize_state(self.policy.optimizer)  # as after the first update
        batches = self._micro_batches()
        if isinstance(config, RLConfig):
            with self._phase("weight_sync"):
                for _ in self.policy.hf_tensors(config.weight_sync.bucket_mb * 2**20):
                    pass
            if needs_old_pass(config.loss):
                with self._phase("logprobs"):
                    self.policy.logprobs(batches, config.rollout.temperature)
            if needs_reference(config.loss):
                reference = self._reference(config)
                with self._phase("reference"):
                    reference.logprobs(batches, config.rollout.temperature)
        loss, temperature = self._loss(batches)
        with self._phase("update"):
            self.policy.update(batches, loss, temperature=temperature)
        mesh = self.mesh
        return RankRecord(
            place=place_of(mesh),
            num_parameters=sum(
                p.numel() for chunk in self.policy.chunks for p in chunk.parameters()
            ),
            parameter_bytes=held["parameters"],
            gradient_bytes=held["gradients"],
            optimizer_bytes=held["optimizer"],
            num_microbatches=self.num_microbatches,
            config_microbatches=shape.num_microbatches,
            shape=(shape.rows, shape.columns),
            phases=tuple(self.phases),
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.world.forget()
        held, began = self.world.live_bytes, time.perf_counter()
        yield
        self.phases.append(
            PhaseRecord(
                name,
                _traffic(self.world.messages, self._names, self.mesh),
                held,
                self.world.peak_bytes - held,
                time.perf_counter() - began,
            )
        )

    def _micro_batches(self) -> list[Any]:
        """Rows of the greatest length, through the run's own batching; all ranks have as many."""
        job, config = self.job, self.job.config
        batching = self.policy.micro_batching(config.train)
        shape, longest = job.shape(), config.model.max_sequence_length
        rows_of_batch = shape.rows
        if config.train.packing:
            rows_of_batch = max(1, shape.columns // shape.row_tokens)
        num_rows = rows_of_batch * self.num_microbatches
        completion = longest - 1
        if isinstance(config, RLConfig):
            completion = min(config.rollout.max_completion_tokens, longest - 1)
        lengths = [longest] * num_rows
        plan = MinibatchPlan(
            samples=[list(range(num_rows))] * self.mesh.dp_size,
            row_lengths=[lengths] * self.mesh.dp_size,
            num_loss_tokens=num_rows * completion * self.mesh.dp_size,
            num_loss_rows=num_rows * self.mesh.dp_size,
        )
        prompt = Prompt(prompt_id="", token_ids=(1,) * (longest - completion), text="")
        row = ([1] * completion, [0.0] * completion, [True] * completion)
        batches = rollout_micro_batches(
            plan,
            dict.fromkeys(range(num_rows), row),
            [prompt] * num_rows,
            torch.zeros(num_rows),
            group_size=1,
            batching=batching,
            dp_rank=self.mesh.dp_rank,
        )
        self._plan = plan
        assert len(batches) == self.num_microbatches, (len(batches), self.num_microbatches)
        return batches

    def _reference(self, config: RLConfig) -> Any:
        if self.policy.lora is not None:
            return self.policy.without_adapters()
        if config.memory.reference == "swap":
            return SwappedReference(self.policy)
        model = MegatronModel(self.job.arch, **self.model_kwargs)
        model.load_hf(FakeWeights(self.job.arch))
        model.freeze()
        return model

    def _loss(self, batches: list[Any]) -> tuple[Any, float]:
        config = self.job.config
        if not isinstance(config, RLConfig):
            return CrossEntropy(self._plan.num_loss_tokens), 1.0
        extra = torch.zeros_like(batches[0].rollout_logprobs)
        for index, batch in enumerate(batches):
            values: dict[str, Any] = {}
            if needs_old_pass(config.loss):
                values["old_logprobs"] = extra
            if needs_reference(config.loss):
                values["ref_logprobs"] = extra
            batches[index] = replace(batch, **values)
        limit = config.rollout.max_completion_tokens
        return PolicyLoss(config.loss, self._plan, limit), config.rollout.temperature


def place_of(mesh: Mesh) -> Place:
    """Where a rank is."""
    return Place(
        rank=mesh.rank,
        tp=mesh.tp_rank,
        pp=mesh.pp_rank,
        dp=mesh.dp_rank,
        cp=mesh.cp_rank,
        ep=mesh.ep_rank,
        etp=mesh.etp_rank,
    )


# ---- messages ------------------------------------------------------------------------------------


def _traffic(
    messages: Counter[Message], names: dict[tuple[int, ...], str], mesh: Mesh
) -> tuple[Traffic, ...]:
    stages = torch.distributed.get_process_group_ranks(mesh.pp_group)
    following = stages[(mesh.pp_rank + 1) % mesh.pp_size]
    found: Counter[tuple[str, str, int, int]] = Counter()
    for message, count in messages.items():
        size = len(message.group)
        if message.kind in ("send", "recv"):
            name = "next" if message.group[0] == following else "previous"
        elif size == mesh.world_size:
            name = "world"
        else:
            name = names.get(message.group, "other")
        if size > 1 or message.kind in ("send", "recv"):  # among one rank nothing is sent
            found[message.kind, name, size, message.num_bytes] += count
    return tuple(Traffic(*key, count) for key, count in sorted(found.items()))


# ---- shards --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSums:
    """What all places of a layout hold together.

    Args:
        num_places: different models that were built.
        num_parameters: of all of them, each shard once, replicas once.
        model_parameters: of the model, as its config.json says.
        padding: rows of zeros that the vocabulary has in Megatron.
        tied_copies: a tied embedding's second copy, on the last of several stages.
        problems: parameters whose shards are not the whole, or that are nowhere or twice.
        seconds: that it took.
    """

    num_places: int
    num_parameters: int
    model_parameters: int
    padding: int
    tied_copies: int
    problems: tuple[str, ...]
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether the shards are the model, and nothing but the model."""
        extra = self.padding + self.tied_copies
        return not self.problems and self.num_parameters == self.model_parameters + extra


def shard_sums(job: Job) -> ShardSums:
    """Build the model of each different (tp, pp, ep, expert-tp) place, and add up.

    Data- and context-parallel replicas hold the same: the world is made as small as the layout
    allows, which leaves each place at least once.
    """
    began, arch = time.perf_counter(), job.arch
    dense_ranks, expert_ranks = job.tp * job.cp, job.ep * job.etp
    world_size = job.pp * math.lcm(dense_ranks, expert_ranks)
    held: dict[str, dict[tuple[int, ...], int]] = {}
    places: set[tuple[int, ...]] = set()
    for rank in range(world_size):
        with fake_world(rank, world_size):
            mesh = meshes.initialize(job.config.parallel, _PLATFORM)
            place = (mesh.pp_rank, mesh.tp_rank, mesh.ep_rank, mesh.etp_rank)
            if place in places:
                continue
            places.add(place)
            model = MegatronModel(
                arch,
                parallel=job.config.parallel,
                precision=job.config.precision,
                memory=job.config.memory,
                max_sequence_length=job.config.model.max_sequence_length,
                mesh=mesh,
                platform=_PLATFORM,
            )
            for row, parameter in model.stage_rows:
                shard = (mesh.pp_rank, mesh.tp_rank)
                if row.expert is not None:
                    shard = (mesh.pp_rank, mesh.ep_rank, mesh.etp_rank)
                held.setdefault(_key(row), {})[shard] = parameter.numel()
    total, padding, tied, problems = 0, 0, 0, list[str]()
    for row in mapping_rows(arch):
        if row.import_only and job.pp == 1:
            continue
        whole = sum(math.prod(shape) for shape in row.shapes)
        if row.layer is None and len(row.shapes[0]) == 2:
            padded = whole // arch.vocab_size * arch.padded_vocab_size(job.tp)
            padding += padded - whole
            whole = padded
        if row.import_only:
            tied += math.prod(row.shapes[0])
        shards = held.pop(_key(row), {})
        parts = job.tp if row.expert is None else job.etp
        if row.layout.tp_dim is None:
            right = len(shards) == parts and set(shards.values()) == {whole}
            total += max(shards.values(), default=0)
        else:
            right = len(shards) == parts and sum(shards.values()) == whole
            total += sum(shards.values())
        if not right:
            problems.append(f"{' + '.join(row.hf)}: {whole} elements, but its shards are {shards}")
    problems += [f"{key}: held, but not in the mapping" for key in held]
    return ShardSums(
        num_places=len(places),
        num_parameters=total,
        model_parameters=sum(math.prod(shape) for shape in hf_shapes(arch).values()),
        padding=padding,
        tied_copies=tied,
        problems=tuple(problems),
        seconds=time.perf_counter() - began,
    )


def _key(row: Any) -> str:
    return f"{'copy of ' if row.import_only else ''}{'+'.join(row.hf)}"
