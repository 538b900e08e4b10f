"""Step time against GPUs under the planner's model: the tables and the chart of docs/scaling.md.

Nothing is measured: each line is the fastest layout that the planner finds to fit. Models are given
as folders with a config.json; no weights are read. A minute on an idle core.

    python tools/scaling_table.py 7B=FOLDER 70B=FOLDER 235B-A22B=FOLDER 30B-A3B=FOLDER [--write]
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.planning.job import Job, load_job
from gdpo_megatron.planning.machine import GPUS, Assumptions
from gdpo_megatron.planning.plan import Plan
from gdpo_megatron.planning.search import Found, search
from gdpo_megatron.planning.tables import in_bytes, layout_name

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
CHART = DOCUMENT.with_suffix(".png")
MARKS = r"(<!-- {} -->\n).*?(\n<!-- end -->)"
GPU_NAMES = ("h100-80", "h200-141")
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

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


PEERS = (
    ("NeMo-RL v0.6", "30B-A3B", 32, 4096, 1102.0, 192.0),
    ("NeMo-RL v0.6", "235B-A22B", 128, 8192, 58.9, 395.0),
)
"""Claims that have a length: stack, model, H100, longest row, tokens/s/GPU, seconds of a step."""


def _job(folder: Path, world_size: int, overrides: Sequence[str] = ()) -> Job:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.yaml"
        path.write_text(yaml.safe_dump(STEP))
        return load_job(path, overrides, world_size=world_size, model_folder=folder)


def beside_peers(folders: Mapping[str, Path]) -> list[str]:
    """Claims, and what the planner says of as many tokens of the same model on as many GPUs."""
    lines = [
        "| stack | model | H100 | rows up to | tokens a step | published: step s | tokens/s/GPU "
        "| planned: step s | of it rollout | tokens/s/GPU | layout | planned / published |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for stack, model, gpus, longest, rate, seconds in PEERS:
        tokens = rate * gpus * seconds
        completion = longest - 512  # of which the planner takes a half, as of the prompt's room
        prompts = round(tokens / (longest / 2) / 16)
        overrides = [
            f"--model.max_sequence_length={longest}",
            f"--rollout.max_completion_tokens={completion}",
            f"--rollout.num_prompts_per_step={prompts}",
        ]
        job = _job(folders[model], gpus, overrides)
        plan = search(job, GPUS[GPU_NAMES[0]], 8, Assumptions()).fitting[0]
        time, rollout = plan.time, _config(plan).rollout
        planned = time.step_tokens / time.seconds / gpus
        cells = [
            *(stack, model, str(gpus), str(longest), f"{tokens / 1e6:.1f} M"),
            *(f"{seconds:.0f}", f"{rate:.0f}", f"{time.seconds:.0f}"),
            *(f"{time.phases['rollout'] / time.seconds:.0%}", f"{planned:.0f}"),
            f"{layout_name(plan.job)}, engine TP{rollout.tensor_parallel_size}",
            f"{time.seconds / seconds:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def searched(folder: Path, gpu: str) -> dict[int, Found]:
    """World size -> what fits it."""
    given = Assumptions()
    return {size: search(_job(folder, size), GPUS[gpu], 8, given) for size in SIZES}


def table(found: Mapping[int, Found]) -> list[str]:
    """Lines of Markdown for one model on one kind of GPU."""
    lines = [
        "| GPUs | layout | engine | memory of a GPU | rollout s | log-probs, reference s "
        "| update s | sync s | step s | tokens/s/GPU | against the first |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first = None
    for size, of_size in found.items():
        if not of_size.fitting:
            lines.append(f"| {size} | {_why_none(of_size)} | | | | | | | | | |")
            continue
        plan = of_size.fitting[0]
        time, rollout = plan.time, _config(plan).rollout
        assert rollout.vllm is not None
        rate = time.step_tokens / time.seconds / size
        first = first or rate
        passes = time.phases.get("logprobs", 0.0) + time.phases.get("reference", 0.0)
        cells = [
            str(size),
            layout_name(plan.job) + (" *" if _is_uneven(plan) else ""),
            f"TP{rollout.tensor_parallel_size}, {rollout.vllm.kv_cache_gib:.0f} GiB cache",
            in_bytes(plan.memory.peak_bytes),
            *(f"{x:.0f}" for x in (time.phases["rollout"], passes, time.phases["update"])),
            f"{time.phases['weight_sync']:.1f}",
            f"{time.seconds:.0f}",
            f"{rate:.0f}",
            f"{rate / first:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _config(plan: Plan) -> RLConfig:
    config = plan.job.config
    assert isinstance(config, RLConfig)
    return config


def _is_uneven(plan: Plan) -> bool:
    return len(set(plan.job.stage_layers)) > 1


def _why_none(found: Found) -> str:
    plan = found.nearest
    if plan is None:
        return "none"
    memory = plan.memory
    return (
        f"none fits; nearest: {layout_name(plan.job)}, engine "
        f"TP{_config(plan).rollout.tensor_parallel_size}: {in_bytes(memory.peak_bytes)} of "
        f"{in_bytes(plan.limit_bytes)} in {memory.peak_phase}"
    )


def draw(results: Mapping[tuple[str, str], Mapping[int, Found]]) -> None:
    """GPUs against step time, both in powers; a dashed line is as fast as more GPUs allow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in results))}
    for (name, gpu), found in results.items():
        points = {n: it.fitting[0].time.seconds for n, it in found.items() if it.fitting}
        solid = gpu == GPU_NAMES[0]
        axes.plot(
            [*points],
            [*points.values()],
            color=colours[name],
            linestyle="-" if solid else ":",
            marker="o" if solid else "s",
            label=f"{name}, {gpu}",
        )
        if solid and points:
            start = min(points)
            ideal = [points[start] * start / n for n in points]
            axes.plot([*points], ideal, "--", color=colours[name], linewidth=0.7, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_xlabel("GPUs (8 a node)")
    axes.set_ylabel("seconds of a step: planned, not measured")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(CHART, dpi=120)


def main() -> None:
    """Print all tables; with --write, put them into the document, and draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md and its chart")
    options = parser.parse_args()
    folders = {
        name: Path(folder) for name, _, folder in (it.partition("=") for it in options.models)
    }
    lacking = {"7B", "70B", *(peer[1] for peer in PEERS)} - folders.keys()
    if lacking:
        parser.error(f"no folder for {', '.join(sorted(lacking))}")
    peers = beside_peers(folders)
    print("\n".join(peers), flush=True)
    results: dict[tuple[str, str], dict[int, Found]] = {}
    lines: list[str] = []
    for gpu in GPU_NAMES:
        for name in ("7B", "70B", "235B-A22B"):
            results[name, gpu] = searched(folders[name], gpu)
            lines += [f"### {name}, {gpu}", "", *table(results[name, gpu]), ""]
            print("\n".join(lines[-len(SIZES) - 5 :]), flush=True)
    if options.write:
        document = DOCUMENT.read_text()
        for place, text in (("planned", lines[:-1]), ("peers", peers)):
            marks = re.compile(MARKS.format(place), re.S)
            assert marks.search(document), f"{DOCUMENT} has no place for {place}"
            new = "\n".join(text)
            document = marks.sub(lambda m, new=new: m[1] + new + m[2], document)
        DOCUMENT.write_text(document)
        draw(results)


if __name__ == "__main__":
    main()
