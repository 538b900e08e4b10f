"""An engine that sleeps and wakes, over and over: the same completions, and memory that stays.

A cycle is a step's: wake, sync with all its checks, generate, sleep. What is held asleep, and the
most that a cycle took, are compared between the second cycle, when all that is kept is there, and
the last one: weights that a cycle leaves behind would be eight copies by then.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gdpo_megatron.certify.check import Findings, Measured, findings_dict
from gdpo_megatron.certify.family_models import save_model
from gdpo_megatron.certify.job import Job
from gdpo_megatron.certify.weight_sync import MAX_LENGTH, MODEL
from gdpo_megatron.platform import Platform

NUM_CYCLES, NUM_FIRST = 10, 2
# 42 MB of weights: what an allocator keeps for itself is small beside them.
LARGE: dict[str, Any] = {
    **MODEL,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


def run_native(job: Job) -> Findings:
    """The native engine."""
    return job.findings(f"{__name__}:on_rank", 1, engine="native")


def run_vllm(job: Job) -> Findings:
    """The engine of vLLM."""
    return job.findings(f"{__name__}:on_rank", 1, engine="vllm")


def on_rank(platform: Platform, folder: Path, *, engine: str) -> dict[str, Any]:
    """Run the cycles on one rank."""
    from gdpo_megatron.certify.engine_parts import EngineParts
    from gdpo_megatron.certify.layout_run import in_layout

    with in_layout(platform) as layout:
        save_model(folder / "model", **LARGE)
        parts = EngineParts(folder / "model", engine, layout, "float32", MAX_LENGTH)
        return cycle(parts, engine)


def cycle(parts: Any, engine: str) -> dict[str, Any]:
    """Sleep and wake, and measure.

    Args:
        parts: EngineParts, whose engine is awake or was never woken.
        engine: its name.
    """
    from gdpo_megatron.conversion.mapping import hf_shapes
    from gdpo_megatron.rollout.base import RolloutRequest, SamplingParams, generate, noise_key
    from gdpo_megatron.weight_sync.canary import TOLERANCES

    probe, sync = parts.policy.platform.memory_probe(), parts.sync(parts.engine)
    sampling = SamplingParams.unrestricted(8)
    requests = [
        RolloutRequest(
            request_id=i,
            prompt_token_ids=prompt.token_ids[: MAX_LENGTH // 2],
            noise_key=noise_key(0, "certify", 0, i, 0),
        )
        for i, prompt in enumerate(parts.prompts)
    ]
    completions: list[list[tuple[int, ...]]] = []
    peaks: list[int] = []
    asleep: list[int] = []
    worst, forget = 0.0, probe.forget or (lambda: None)
    for number in range(NUM_CYCLES):
        forget()
        parts.engine.wake()
        report = sync.run(number + 1)
        worst = max(worst, report.canary.max_logprob_diff)
        done = sorted(generate(parts.engine, requests, sampling), key=lambda it: it.request_id)
        completions.append([it.completion.token_ids for it in done])
        peaks.append(probe.peak())
        parts.engine.sleep()
        forget()
        asleep.append(probe.peak())
    copy = 4 * sum(math.prod(shape) for shape in hf_shapes(parts.policy.arch).values()) / 2**20
    different = sum(it != completions[0] for it in completions)
    measured = [
        Measured("cycles", len(completions), "==", NUM_CYCLES),
        Measured("cycles that say something else than the first", different, "==", 0),
        Measured("canary_max_logprob_diff", worst, "<=", TOLERANCES["float32"].largest),
    ]
    # A quarter of what a copy left by each cycle would be; an allocator keeps some for itself.
    bound = copy * (NUM_CYCLES - NUM_FIRST) / 4
    for what, held in (("most of a cycle", peaks), ("held asleep", asleep)):
        growth = (held[-1] - held[NUM_FIRST - 1]) / 2**20
        measured.append(Measured(f"{probe.kind}, {what}: growth in MiB", growth, "<=", bound))
    notes = list(_notes(engine))
    if probe.forget is None:
        notes.append("memory: peaks since the process began, for they cannot be reset here")
    return findings_dict(measured, notes)


def _notes(engine: str) -> list[str]:
    """What the numbers do not say."""
    from gdpo_megatron.platform.vllm_versions import installed_vllm

    installed = installed_vllm() if engine == "vllm" else None
    if installed is not None and installed.for_cpu:
        return ["vLLM on a CPU keeps weights and cache while it sleeps: nothing was given back"]
    return []
