"""What train, sft, eval and generate have in common: a worker's parts, built in the right order.

Megatron is imported only after the platform has prepared it, so this module and everything that
imports Megatron is imported by the worker, never by the launcher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gdpo_megatron.config.launch import LaunchConfig
from gdpo_megatron.config.memory import MemoryConfig
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.config.schema import (
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
)
from gdpo_megatron.config.vllm import VllmConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import RandomWeights, stop_token_ids
from gdpo_megatron.conversion.hf_writer import write_hf_folder
from gdpo_megatron.conversion.model_folder import copy_model_config, model_files, open_checkpoint
from gdpo_megatron.conversion.peft_writer import write_peft_folder
from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.distributed import mesh as meshes
from gdpo_megatron.distributed.mesh import EngineMesh, Mesh
from gdpo_megatron.environments.pool import EnvironmentPool
from gdpo_megatron.platform import Platform
from gdpo_megatron.policy.lora import peft_tensors
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.policy.weights import TensorReader
from gdpo_megatron.rollout.base import EngineSetup, RolloutEngine, engines
from gdpo_megatron.rollout.episodes import EnvironmentRuntime

PEFT_FOLDER = "peft"
"""Beside the export of a LoRA run: its adapters alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What every job starts from.

    Args:
        platform: the machine.
        mesh: the trainer's mesh.
        base_dir: folder that the config's relative paths start from.
        folder: the model's folder, of either format.
        arch: its shape.
        tokenizer: its tokenizer.
    """

    platform: Platform
    mesh: Mesh
    base_dir: Path
    folder: Path
    arch: ModelArchitecture
    tokenizer: Tokenizer
    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    memory: MemoryConfig
    seed: int

    def reader(self) -> TensorReader:
        """Where the initial weights come from."""
        if self.model.init == "random":
            return RandomWeights(self.arch, self.seed)
        return open_checkpoint(self.folder, self.arch)

    def model_kwargs(self) -> dict[str, object]:
        """Constructor arguments of MegatronModel besides `arch`."""
        return {
            "parallel": self.parallel,
            "precision": self.precision,
            "memory": self.memory,
            "max_sequence_length": self.model.max_sequence_length,
            "mesh": self.mesh,
            "platform": self.platform,
        }

    def frozen_model(self, packing: bool) -> MegatronModel:
        """A model with the initial weights that is never updated: the reference."""
        model = MegatronModel(self.arch, packing=packing, **self.model_kwargs())  # pyright: ignore[reportArgumentType]
        model.load_hf(self.reader())
        model.freeze()
        return model

    def engine(
        self, config: RolloutConfig, max_concurrent_sequences: int
    ) -> tuple[RolloutEngine, EngineMesh]:
        """A rollout engine over the same ranks; collective."""
        engine_mesh = meshes.engine_mesh(self.mesh, config.tensor_parallel_size)
        setup = EngineSetup(
            arch=self.arch,
            tokenizer=self.tokenizer,
            model_files=model_files(self.folder),
            mesh=engine_mesh,
            platform=self.platform,
            dtype=getattr(torch, self.precision.params_dtype),
            max_sequence_length=self.model.max_sequence_length,
            max_concurrent_sequences=max_concurrent_sequences,
            seed=self.seed,
            vllm=config.vllm or VllmConfig(),
        )
        return engines.get(config.engine, self.base_dir)(setup), engine_mesh

    def environment(
        self, config: RolloutConfig, sandbox: SandboxConfig, engines: EngineMesh, run_dir: Path
    ) -> EnvironmentRuntime | None:
        """What answers the model between its turns, where the run has that."""
        if config.environment is None:
            return None
        pool = None
        if engines.tp_rank == 0:
            pool = EnvironmentPool(
                config.environment,
                base_dir=self.base_dir,
                sandbox=sandbox,
                log_path=run_dir / f"environment_{self.mesh.rank}.log",
            )
        return EnvironmentRuntime(
            config.environment, pool, self.tokenizer, engines, self.platform.device
        )

    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: of the generation config, else of the tokenizer."""
        return stop_token_ids(model_files(self.folder), self.tokenizer.eos_token_id)

    def write_hf_files(self, folder: Path) -> None:
        """Write what a checkpoint needs to be a model again: config, tokenizer, stop tokens."""
        copy_model_config(
            model_files(self.folder), folder, getattr(torch, self.precision.params_dtype)
        )
        self.tokenizer.save(folder)

    def export(self, model: MegatronModel, folder: Path) -> None:
        """Write a Hugging Face folder, and adapters beside it for PEFT; collective."""
        tensors = model.hf_tensors()
        if self.mesh.rank != 0:
            for _ in tensors:
                pass
        else:
            write_hf_folder(
                folder,
                tensors,
                self.arch,
                dtype=getattr(torch, self.precision.params_dtype),
                source=self.folder,
                save_tokenizer=self.tokenizer.save,
            )
        if model.lora is not None:
            adapters, lora = peft_tensors(model), model.lora.config
            if self.mesh.rank != 0:
                for _ in adapters:
                    pass
            else:
                write_peft_folder(
                    folder.with_name(PEFT_FOLDER), adapters, self.arch, lora, base=self.folder
                )
        torch.distributed.barrier()


def build_parts(
    platform: Platform,
    base_dir: Path,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    memory: MemoryConfig,
    seed: int,
    launch: LaunchConfig | None = None,
) -> Parts:
    """Join the ranks and read what describes the model; collective."""
    import gdpo_megatron.rollout.engines  # noqa: F401  # registers them

    folder = resolve_path(base_dir, model.hf_path)
    files = model_files(folder)
    tokenizer_path = resolve_path(base_dir, model.tokenizer_path) if model.tokenizer_path else files
    return Parts(
        platform=platform,
        mesh=meshes.initialize(parallel, platform, launch),
        base_dir=base_dir,
        folder=folder,
        arch=load_architecture(files),
        tokenizer=load_tokenizer(tokenizer_path),
        model=model,
        parallel=parallel,
        precision=precision,
        memory=memory,
        seed=seed,
    )
