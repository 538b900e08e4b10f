"""Step time against GPUs under the planner's model, as the tables of docs/scaling.md.

Nothing is measured: each line is the fastest layout that the planner finds to fit. Models are given
as folders with a config.json; no weights are read.

    python tools/scaling_table.py NAME=FOLDER ... [--gpu h100-80] [--gpus 8 32 128 ...]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml

from gdpo_megatron.planning.job import Job, load_job
from gdpo_megatron.planning.machine import GPUS, Assumptions
from gdpo_megatron.planning.search import layouts_that_fit
from gdpo_megatron.planning.tables import in_bytes, layout_name

STEP: dict[str, Any] = {
    "run_dir": "run",
    "model": {"hf_path": ".", "max_sequence_length": 8192},
    "data": {"train": "prompts.jsonl"},
    "rewards": [{"name": "length", "type": "length_limit"}],
    "precision": {"params_dtype": "bfloat16"},
    "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "memory": {
        "logprob_chunk_tokens": 1024,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "free_grad_buffers_during_rollout": True,
        "reference": "swap",
    },
    "rollout": {
        "engine": "vllm",
        "num_prompts_per_step": 512,
        "group_size": 16,
        "max_completion_tokens": 7168,
        "max_concurrent_sequences": 64,
    },
    "loss": {"kl_coef": 0.001},
    "train": {"max_tokens_per_micro_batch": 8192},
}
"""8192 completions of up to 7168 tokens, one update."""


def _job(folder: Path, world_size: int) -> Job:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.yaml"
        path.write_text(yaml.safe_dump(STEP))
        return load_job(path, [], world_size=world_size, model_folder=folder)


def table(folder: Path, gpu: str, sizes: list[int]) -> list[str]:
    """Lines of Markdown for one model."""
    lines = [
        "| GPUs | layout | engine TP | memory of a GPU | rollout s | log-probs, reference s "
        "| update s | sync s | step s | tokens/s/GPU | against the first |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first = None
    for world_size in sizes:
        job = _job(folder, world_size)
        found = layouts_that_fit(job, GPUS[gpu], 8, Assumptions(), at_most=1)
        if not found:
            lines.append(f"| {world_size} | none fits | | | | | | | | | |")
            continue
        (plan,) = found
        time, config = plan.time, plan.job.config
        rate = time.step_tokens / time.seconds / world_size
        first = first or rate
        passes = time.phases.get("logprobs", 0.0) + time.phases.get("reference", 0.0)
        cells = [
            str(world_size),
            layout_name(plan.job),
            str(config.rollout.tensor_parallel_size),  # pyright: ignore[reportAttributeAccessIssue]
            in_bytes(plan.memory.peak_bytes),
            *(f"{x:.0f}" for x in (time.phases["rollout"], passes, time.phases["update"])),
            f"{time.phases['weight_sync']:.1f}",
            f"{time.seconds:.0f}",
            f"{rate:.0f}",
            f"{rate / first:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--gpu", default="h100-80", choices=sorted(GPUS))
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    )
    options = parser.parse_args()
    for model in options.models:
        name, _, folder = model.partition("=")
        print(f"\n### {name}, {options.gpu}\n")
        print("\n".join(table(Path(folder), options.gpu, options.gpus)), flush=True)


if __name__ == "__main__":
    main()
