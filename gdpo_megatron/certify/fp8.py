"""An update whose linear layers multiply in FP8, and the parity check that a run has before it.

The bounds are the check's defaults (`precision.fp8.parity_check`). FP8 that changes nothing has not
multiplied in 8 bits, so a difference is asked for as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdpo_megatron.certify.check import Findings, Measured, Situation, findings_dict
from gdpo_megatron.certify.job import Job
from gdpo_megatron.config.fp8 import Fp8Config, ParityCheckConfig
from gdpo_megatron.platform import Platform

_MODEL = "tied"


def missing(situation: Situation) -> str | None:
    """What torch's FP8 product lacks here."""
    return situation.platform.missing_for_fp8()


def run(job: Job) -> Findings:
    """On one device."""
    return job.findings(f"{__name__}:on_rank", 1)


def on_rank(platform: Platform, folder: Path) -> dict[str, Any]:
    """Check parity, then update once."""
    from gdpo_megatron.certify import layout_run
    from gdpo_megatron.certify.layout_models import (
        MICRO_BATCH_SIZE,
        TEMPERATURE,
        make_rollouts,
        write_models,
    )
    from gdpo_megatron.config.schema import TrainConfig
    from gdpo_megatron.data.batching import make_micro_batches
    from gdpo_megatron.policy.parity_check import Fp8Drift, ParityGate

    bounds = ParityCheckConfig()
    fp8 = Fp8Config(backend="scaled_mm", parity_check=bounds)
    rollouts = make_rollouts()
    write_models(folder / "models", [_MODEL])
    with layout_run.in_layout(platform) as layout:
        policy, reference = layout_run.make_models(folder / "models", _MODEL, layout, fp8=fp8)
        batching = policy.micro_batching(TrainConfig(micro_batch_size=MICRO_BATCH_SIZE))
        samples = range(len(rollouts.completions))
        batches = make_micro_batches([rollouts.row(s) for s in samples], batching)
        gate = ParityGate(fp8, policy, reference)
        try:
            found, _ = gate.check(batches[0], temperature=TEMPERATURE)
        except Fp8Drift as drift:
            found = drift.metrics
        logprobs = layout_run.own_logprobs(policy, rollouts, batching, layout["mesh"])
        (step,) = layout_run.update_policy(
            policy,
            reference,
            layout_run.make_plans(rollouts, 1, policy.arch.hidden_size)[:1],
            rollouts,
            layout_run.with_noise(logprobs, rollouts),
            batching,
            layout["mesh"],
        )
        active = gate.active
    drift, cosine = found["fp8/max_logprob_diff"], found["fp8/grad_cosine"]
    return findings_dict(
        [
            Measured("max_logprob_diff", drift, "<=", bounds.max_logprob_diff),
            Measured("max_logprob_diff, that of FP8 at all", drift, ">", 0),
            Measured("grad_cosine", cosine, ">=", bounds.min_grad_cosine),
            Measured("grad_norm of an update", step["grad_norm"], ">", 0),
            Measured("FP8 in use", float(active), "==", 1),
        ]
    )
