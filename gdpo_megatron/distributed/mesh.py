"""Who works with whom: the trainer's mesh and the rollout engines' mesh over the same ranks.

The trainer's mesh is Megatron's: TP x CP x DP x PP; a mixture's experts are spread over ranks that
differ in DP or CP (EP).
The engines' mesh cuts the same world into replicas of `engine_tp` neighbouring ranks, whatever the
trainer's layout is; each replica generates a part of the step's prompts. Data crosses between the
two by sample id (see exchange.py).
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from gdpo_megatron.config.launch import LaunchConfig
from gdpo_megatron.config.schema import ParallelConfig
from gdpo_megatron.platform import Platform


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """This rank's place in the trainer's mesh."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    tp_group: ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: ProcessGroup
    cp_rank: int
    cp_size: int
    cp_group: ProcessGroup
    ep_rank: int
    ep_size: int
    ep_group: ProcessGroup
    etp_rank: int
    etp_size: int
    etp_group: ProcessGroup
    """Ranks that share each expert."""

    tp_cp_group: ProcessGroup
    """Ranks that share each tensor of a layer: its columns, its tokens."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.pp_rank == self.pp_size - 1

    def trainer_ranks(self, dp_rank: int) -> list[int]:
        """Global ranks that train on one data-parallel rank's rows (order tp-cp-dp-pp)."""
        replica = self.tp_size * self.cp_size
        stage = replica * self.dp_size
        return [
            pp * stage + dp_rank * replica + rank
            for pp in range(self.pp_size)
            for rank in range(replica)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMesh:
    """This rank's place among the rollout engines."""

    replica: int
    num_replicas: int
    tp_rank: int
    tp_size: int
    tp_group: ProcessGroup | None
    """None where an engine is one rank."""

    def leader(self, replica: int) -> int:
        """Global rank that speaks for a replica."""
        return replica * self.tp_size


def join(platform: Platform, launch: LaunchConfig) -> None:
    """Choose this rank's device and join the process group that torchrun describes; collective."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    platform.setup(local_rank)
    timeout = datetime.timedelta(seconds=launch.collective_timeout_seconds)
    dist.init_process_group(platform.backend, timeout=timeout)


def initialize(
    parallel: ParallelConfig, platform: Platform, launch: LaunchConfig | None = None
) -> Mesh:
    """Build Megatron's groups, over the process group that torchrun describes; collective.

    The caller has called `platform.prepare_megatron()`; where it has not called `join`, this does.

    Args:
        parallel: the layout.
        platform: the machine.
        launch: how long ranks wait for one another; None takes its defaults.
    """
    launch = launch or LaunchConfig()
    if not dist.is_initialized():
        join(platform, launch)
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not ps.model_parallel_is_initialized():
        ps.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline_model_parallel_size
                if parallel.virtual_pipeline_model_parallel_size > 1
                else None
            ),
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            distributed_timeout_minutes=launch.collective_timeout_seconds / 60,  # pyright: ignore[reportArgumentType]
        )
        # Megatron wants its tracker seeded; we have no dropout, so nothing is drawn from it.
        model_parallel_cuda_manual_seed(0)
    # Typed as what they might be before initialisation; now they are groups.
    tp_group: Any = ps.get_tensor_model_parallel_group()
    pp_group: Any = ps.get_pipeline_model_parallel_group()
    dp_group: Any = ps.get_data_parallel_group()
    cp_group: Any = ps.get_context_parallel_group()
    ep_group: Any = ps.get_expert_model_parallel_group()
    etp_group: Any = ps.get_expert_tensor_parallel_group()
    tp_cp_group: Any = ps.get_tensor_and_context_parallel_group()
    mesh = Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=tp_group.rank(),
        tp_size=tp_group.size(),
        tp_group=tp_group,
        pp_rank=pp_group.rank(),
        pp_size=pp_group.size(),
        pp_group=pp_group,
        dp_rank=dp_group.rank(),
        dp_size=dp_group.size(),
        dp_group=dp_group,
        cp_rank=cp_group.rank(),
        cp_size=cp_group.size(),
        cp_group=cp_group,
        ep_rank=ep_group.rank(),
        ep_size=ep_group.size(),
        ep_group=ep_group,
        etp_rank=etp_group.rank(),
        etp_size=etp_group.size(),
        etp_group=etp_group,
        tp_cp_group=tp_cp_group,
    )
    assert mesh.rank in mesh.trainer_ranks(mesh.dp_rank), "Megatron's rank order is not tp-cp-dp-pp"
    return mesh


def destroy() -> None:
    """Give Megatron's groups back, so that a mesh of another layout can follow; collective."""
    from megatron.core import parallel_state as ps

    ps.destroy_model_parallel()


def group_names() -> dict[tuple[int, ...], str]:
    """Names of Megatron's groups by their ranks; where two are the same ranks, the plainer name."""
    from megatron.core import parallel_state as ps

    groups: dict[str, Any] = {
        "tp": ps.get_tensor_model_parallel_group(),
        "cp": ps.get_context_parallel_group(),
        "ep": ps.get_expert_model_parallel_group(),
        "expert-tp": ps.get_expert_tensor_parallel_group(),
        "dp": ps.get_data_parallel_group(),
        "dp-cp": ps.get_data_parallel_group(with_context_parallel=True),
        "expert-dp": ps.get_expert_data_parallel_group(),
        "expert-tp-ep": ps.get_expert_tensor_and_model_parallel_group(),
        "pp": ps.get_pipeline_model_parallel_group(),
        "tp-cp": ps.get_tensor_and_context_parallel_group(),
        "embedding": ps.get_embedding_group(check_initialized=False),
        "tp-pp": ps.get_model_parallel_group(),
    }
    names: dict[tuple[int, ...], str] = {}
    for name, group in groups.items():
        if isinstance(group, ProcessGroup):
            names.setdefault(tuple(dist.get_process_group_ranks(group)), name)
    return names


def engine_mesh(mesh: Mesh, tensor_parallel_size: int) -> EngineMesh:
    """Cut the world into engine replicas; collective over all ranks."""
    num_replicas = mesh.world_size // tensor_parallel_size
    replica, tp_rank = divmod(mesh.rank, tensor_parallel_size)
    own_group = None
    if tensor_parallel_size > 1:
        for index in range(num_replicas):
            start = index * tensor_parallel_size
            group: Any = dist.new_group(list(range(start, start + tensor_parallel_size)))
            if index == replica:
                own_group = group
    return EngineMesh(
        replica=replica,
        num_replicas=num_replicas,
        tp_rank=tp_rank,
        tp_size=tensor_parallel_size,
        tp_group=own_group,
    )
