"""Weights from a Megatron policy into vLLM, on this rank: what it says with the new ones."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from rank_layouts import in_layout  # prepares Megatron: comes first

import torch  # isort: skip
from support.engines import engine_setup
from torch import Tensor

from gdpo_megatron.config.schema import PrecisionConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.distributed import mesh as meshes
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.rollout.base import (
    RolloutEngine,
    RolloutRequest,
    SamplingParams,
    engines,
    generate,
    noise_key,
)

Completions = list[tuple[list[int], list[float]]]


class OtherWeights:
    """The model's weights a good deal off: what the engine has before the sync that counts."""

    def __init__(self, reader: HFCheckpoint):
        self._reader = reader

    def get(self, name: str) -> Tensor:
        tensor = self._reader.get(name)
        return tensor * 0.7 + 0.01


def run(
    models: str,
    cases: list[dict[str, Any]],
    layouts: dict[str, dict[str, int]],
    prompts: list[list[int]],
    sampling: dict[str, Any],
) -> list[dict[str, Completions]]:
    """For each case and layout, completions of this rank's engine after its second sync.

    Args:
        models: folder of the model folders.
        cases: model, dtype, tensor_parallel_size of the engine.
        layouts: of the trainer: name -> arguments of `in_layout`.
        prompts: token ids, completed after the first sync too: their cache must not be used again.
        sampling: fields of SamplingParams.
    """
    return [_case(Path(models), case, layouts, prompts, sampling) for case in cases]


def _case(
    models: Path,
    case: dict[str, Any],
    layouts: dict[str, dict[str, int]],
    prompts: list[list[int]],
    sampling: dict[str, Any],
) -> dict[str, Completions]:
    folder = models / case["model"]
    arch = load_architecture(folder)
    engine: Any = None
    results: dict[str, Completions] = {}
    for name, layout in layouts.items():
        with in_layout(**layout) as where:
            if engine is None:
                engine = engines.get("vllm")(
                    engine_setup(
                        folder,
                        mesh=meshes.engine_mesh(where["mesh"], case["tensor_parallel_size"]),
                        dtype=getattr(torch, case["dtype"]),
                        max_sequence_length=256,
                    )
                )
                _check_shared_memory(case["tensor_parallel_size"])
            precision = PrecisionConfig(params_dtype=case["dtype"])
            model = MegatronModel(arch, precision=precision, max_sequence_length=256, **where)
            results[name] = _synced(model, folder, arch, engine, prompts, sampling)
            del model
    engine.close()
    gc.collect()
    return results


def _check_shared_memory(tensor_parallel_size: int) -> None:
    """What its ranks share has no name that another run would meet, or that a kill would leave."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    shared = [line for line in maps if "cpushm" in line]
    assert shared or tensor_parallel_size == 1
    assert all("/gdpo_megatron-" in line and line.endswith("(deleted)") for line in shared), shared


def _synced(
    model: MegatronModel,
    folder: Path,
    arch: ModelArchitecture,
    engine: RolloutEngine,
    prompts: list[list[int]],
    sampling: dict[str, Any],
) -> Completions:
    reader = HFCheckpoint(folder, arch)
    completions: Completions = []
    for version, weights in enumerate((OtherWeights(reader), reader)):
        model.load_hf(weights)
        engine.wake()
        engine.load_weights(model.hf_tensors(), version)
        requests = [
            RolloutRequest(
                request_id=i,
                prompt_token_ids=tuple(prompt),
                noise_key=noise_key(3, "test", version, i, 0),
            )
            for i, prompt in enumerate(prompts)
        ]
        done = generate(engine, requests, SamplingParams(**sampling))
        assert {it.policy_version for it in done} == {version}
        completions = [(list(c.token_ids), list(c.logprobs)) for c in (d.completion for d in done)]
        engine.sleep()
    return completions
