"""The policy's weights in a rollout engine, with every check of the sync on.

Two syncs of different weights, so that what outlived the first shows in the second. A sync whose
checks fail raises, and says which tensor or token it was: docs/rollout.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdpo_megatron.certify.check import Findings, Measured, Relation, Situation, findings_dict
from gdpo_megatron.certify.family_models import save_model
from gdpo_megatron.certify.job import Job
from gdpo_megatron.platform import Platform

MODEL: dict[str, Any] = {
    "model_type": "qwen2",
    "tie_word_embeddings": True,
    "hidden_size": 128,
    "head_dim": 32,  # what vLLM's attention takes on a CPU
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
}
MAX_LENGTH = 64
_DTYPE = "float32"


def missing_vllm(situation: Situation) -> str | None:
    """What an engine of vLLM needs, as far as its metadata tell."""
    from gdpo_megatron.platform.vllm_versions import vllm_problems

    return "; ".join(vllm_problems()) or None


def run_native(job: Job) -> Findings:
    """To the native engine."""
    return _run(job, "native")


def run_vllm(job: Job) -> Findings:
    """To vLLM."""
    return _run(job, "vllm")


def _run(job: Job, engine: str) -> Findings:
    num_ranks = min(2, job.situation.num_devices)
    return job.findings(f"{__name__}:on_rank", num_ranks, engine=engine, tp=num_ranks)


def on_rank(platform: Platform, folder: Path, *, engine: str, tp: int) -> dict[str, Any]:
    """Sync twice.

    Args:
        platform: the machine.
        folder: for the model.
        engine: its name; each rank has one.
        tp: tensor parallel size of the policy.
    """
    import torch.distributed as dist

    from gdpo_megatron.certify.engine_parts import EngineParts
    from gdpo_megatron.certify.layout_run import in_layout

    with in_layout(platform, tp=tp) as layout:
        if layout["mesh"].rank == 0:
            save_model(folder / "model", **MODEL)
        dist.barrier()
        parts = EngineParts(folder / "model", engine, layout, _DTYPE, MAX_LENGTH)
        reports = parts.right()
        parts.close()
    return findings_dict(
        [it for number, report in enumerate(reports, 1) for it in measured_of(number, report)]
    )


def measured_of(number: int, report: Mapping[str, float]) -> list[Measured]:
    """Hold a sync's metrics to what must be so.

    Args:
        number: of the sync.
        report: `SyncReport.metrics`.
    """
    from gdpo_megatron.weight_sync.canary import TOLERANCES

    def measured(name: str, relation: Relation, bound: float) -> Measured:
        return Measured(f"sync {number}: {name}", report[f"weight_sync/{name}"], relation, bound)

    tolerance = TOLERANCES[_DTYPE]
    return [
        measured("num_checksums", ">=", 1),
        measured("num_resident", ">=", 1),
        measured("canary_num_tokens", ">=", 1),
        measured("canary_max_logprob_diff", "<=", tolerance.largest),
        measured("canary_mean_logprob_diff", "<=", tolerance.mean),
    ]
