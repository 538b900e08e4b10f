"""A small policy, a rollout engine beside it, and the sync between them, with all its checks on.

Imports Megatron: the platform has prepared it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import gdpo_megatron.rollout.engines  # noqa: F401  # registers them
from gdpo_megatron.config.schema import OptimizerConfig, PrecisionConfig, TrainConfig
from gdpo_megatron.config.vllm import VllmConfig
from gdpo_megatron.config.weight_sync import CanaryConfig, WeightSyncConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.data.tokenizer import load_tokenizer
from gdpo_megatron.distributed import mesh as meshes
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.rollout.base import EngineSetup, RolloutEngine, engines
from gdpo_megatron.types import Prompt
from gdpo_megatron.weight_sync import Canary, WeightSync, tolerance_of


class EngineParts:
    """A policy and an engine that stay, with a sync made anew for each case.

    Args:
        folder: of the model, with a tokenizer.
        engine: a registered rollout engine, one rank each.
        layout: of `in_layout`, within it.
        dtype: of the policy and the engine.
        max_length: of prompt and completion.
    """

    def __init__(
        self, folder: Path, engine: str, layout: Mapping[str, Any], dtype: str, max_length: int
    ):
        arch, draw = load_architecture(folder), random.Random(3)
        reader = HFCheckpoint(folder, arch)
        precision: Any = dtype
        self.max_length = max_length
        self.dtype, self.train = dtype, TrainConfig(micro_batch_size=2)
        self.policy = MegatronPolicy(
            arch,
            optimizer=OptimizerConfig(),
            total_updates=1,
            make_reader=lambda: reader,
            precision=PrecisionConfig(params_dtype=precision),
            max_sequence_length=max_length,
            **layout,
        )
        self.start = [parameter.detach().clone() for _, parameter in self.policy.stage_rows]
        self.mesh = meshes.engine_mesh(layout["mesh"], 1)
        # Annotated loosely: what an engine has besides the protocol, a check may use.
        self.engine: Any = engines.get(engine)(
            EngineSetup(
                arch=arch,
                tokenizer=load_tokenizer(folder),
                model_files=folder,
                mesh=self.mesh,
                platform=layout["platform"],
                dtype=getattr(torch, dtype),
                max_sequence_length=max_length,
                max_concurrent_sequences=8,
                seed=1,
                vllm=VllmConfig(kv_cache_gib=0.125),
            )
        )
        self.prompts = [
            Prompt(
                prompt_id=f"row {i}",
                token_ids=tuple(draw.randrange(3, arch.vocab_size) for _ in range(n)),
                text="",
            )
            # The third may be as long as a block of a prefix cache, the last one is cut.
            for i, n in enumerate((5, 1, max_length * 3 // 4, max_length + 16))
        ]

    def close(self) -> None:
        """Make room for another engine, where that needs something done."""
        getattr(self.engine, "close", lambda: None)()

    def sync(self, engine: RolloutEngine, interval: int = 1) -> WeightSync:
        """A sync of the policy to an engine, in small buckets, so that there are several.

        Args:
            engine: this rank's.
            interval: `weight_sync.checksum_interval`; the canary is always asked.
        """
        config = WeightSyncConfig(
            bucket_mb=1,
            checksum_interval=interval,
            canary=CanaryConfig(interval=1, num_prompts=3, num_tokens=6),
        )
        canary = Canary(
            config.canary,
            self.prompts,
            policy=self.policy,
            engine=engine,
            engines=self.mesh,
            batching=self.policy.micro_batching(self.train),
            temperature=0.8,
            max_sequence_length=self.max_length,
            seed=5,
            tolerance=tolerance_of(config.canary, self.dtype),
        )
        return WeightSync(config, self.policy, engine, canary)

    @torch.no_grad()
    def change(self) -> None:
        """As an update would: all weights, the same on all ranks."""
        for _, parameter in self.policy.stage_rows:
            parameter.mul_(1.05)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo all changes."""
        for (_, parameter), value in zip(self.policy.stage_rows, self.start, strict=True):
            parameter.copy_(value)

    def right(self) -> list[dict[str, float]]:
        """Two syncs of different weights: their metrics."""
        self.engine.wake()
        sync = self.sync(self.engine)
        reports = [sync.run(1)]
        self.change()
        reports.append(sync.run(2))
        self.restore()
        return [report.metrics() for report in reports]
