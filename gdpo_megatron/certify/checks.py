"""The table of checks, in the order in which they run."""

from __future__ import annotations

from gdpo_megatron.certify import (
    fp8,
    layouts,
    logits,
    resume,
    round_trip,
    sleep_wake,
    training,
    weight_sync,
)
from gdpo_megatron.certify.check import Check
from gdpo_megatron.errors import InputError, did_you_mean

_RUN_SECONDS = 1800.0

CHECKS = (
    Check(
        name="logits",
        proves="logits of every family are transformers' (Megatron's local layers)",
        run=logits.run_local,
    ),
    Check(
        name="logits_te",
        proves="the same with Transformer Engine's layers",
        run=logits.run_transformer_engine,
        missing=logits.missing_engine,
    ),
    Check(
        name="round_trip",
        proves="Hugging Face to Megatron and back: the same tensors, the same bytes",
        run=round_trip.run,
    ),
    Check(
        name="weight_sync_native",
        proves="the policy's weights in the native engine: checksums, canary",
        run=weight_sync.run_native,
    ),
    Check(
        name="weight_sync_vllm",
        proves="the same in vLLM",
        run=weight_sync.run_vllm,
        missing=weight_sync.missing_vllm,
    ),
    Check(
        name="sleep_wake_native",
        proves="10 cycles of sleep and wake: the same completions, no growing memory",
        run=sleep_wake.run_native,
    ),
    Check(
        name="sleep_wake_vllm",
        proves="the same with vLLM",
        run=sleep_wake.run_vllm,
        missing=weight_sync.missing_vllm,
    ),
    Check(
        name="fp8",
        proves="an update in FP8 (scaled_mm) and its parity check",
        run=fp8.run,
        missing=fp8.missing,
    ),
    Check(
        name="layouts",
        proves="TP, PP, DP and others against one process: log-probs, gradients, weights",
        run=layouts.run,
        missing=layouts.missing,
    ),
    Check(
        name="resume",
        proves="a run killed with SIGKILL goes on and ends where one left alone does",
        run=resume.run,
        seconds=_RUN_SECONDS,
    ),
    Check(
        name="gdpo_run",
        proves="SFT, then GDPO on GSM8K's rewards with a small model: rewards within bands",
        run=training.run_problems,
        seconds=_RUN_SECONDS,
    ),
    Check(
        name="model_run",
        proves="two steps of GDPO of a given model on GSM8K, and its export",
        run=training.run_model,
        missing=training.missing_model,
        seconds=2 * _RUN_SECONDS,
    ),
)


def choose(names: list[str]) -> list[Check]:
    """Checks by name, in the table's order; all where none is named.

    Raises:
        InputError: no check of such a name.
    """
    known = [check.name for check in CHECKS]
    problems = [
        f"--only {name}: no check named '{name}'; {did_you_mean(name, known)}"
        for name in names
        if name not in known
    ]
    if problems:
        raise InputError(problems)
    return [check for check in CHECKS if not names or check.name in names]
