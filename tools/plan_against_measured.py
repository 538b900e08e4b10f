"""The plan's memory beside that of real CPU runs, layout by layout.

Small models are trained for one update over gloo, each world size in one torchrun. Parameters,
gradients and optimizer state are the bytes of the tensors themselves. Activations are the largest
sum of live storages between the start of an update and its gradients (planning/measure.py), beyond
what was held before. The table is written into docs/planning.md.

    OMP_NUM_THREADS=1 python tools/plan_against_measured.py [--print]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

DOCUMENT = Path(__file__).parents[1] / "docs" / "planning.md"
TOKENS = 513
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2 4 x 256": QWEN2,
    "qwen2 8 x 384, tied": {
        **QWEN2,
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "tie_word_embeddings": True,
    },
    "qwen3 6 x 256": {
        **QWEN2,
        "model_type": "qwen3",
        "num_hidden_layers": 6,
        "head_dim": 64,
    },
    "llama 4 x 512": {
        **QWEN2,
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "vocab_size": 8000,
    },
    "qwen3_moe 4 x 256, 8 experts": {
        **QWEN2,
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
}
QWEN3, LLAMA, TIED = "qwen3 6 x 256", "llama 4 x 512", "qwen2 8 x 384, tied"
SMALL, MOE = "qwen2 4 x 256", "qwen3_moe 4 x 256, 8 experts"

CHUNKS = {"logprob_chunk_tokens": 128}
MLP = CHUNKS | {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
FULL = CHUNKS | {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 2}


def _layout(**sizes: Any) -> dict[str, Any]:
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "sp": "sequence_parallel",
        "overlap": "overlap_grad_reduce",
    }
    return {names[name]: size for name, size in sizes.items()}


CASES: dict[int, list[tuple[str, str, dict[str, Any], dict[str, Any]]]] = {
    # ranks -> (model, dtype, parallel, memory)
    1: [
        (SMALL, "float32", {}, {}),
        (SMALL, "float32", {}, CHUNKS),
        (TIED, "float32", {}, MLP),
        (LLAMA, "float32", {}, FULL),
        (LLAMA, "float32", {}, BLOCK),
        (QWEN3, "bfloat16", {}, CHUNKS),
        (MOE, "float32", {}, CHUNKS),
    ],
    2: [
        (QWEN3, "float32", _layout(tp=2), CHUNKS),
        (LLAMA, "float32", _layout(tp=2, sp=True), {}),
        (TIED, "float32", _layout(pp=2), CHUNKS),
        (SMALL, "float32", _layout(pp=2, vp=2), CHUNKS),
        (QWEN3, "float32", _layout(cp=2), CHUNKS),
        (SMALL, "bfloat16", _layout(overlap=True), MLP),
        (MOE, "float32", _layout(ep=2), CHUNKS),
    ],
    4: [
        (LLAMA, "float32", _layout(tp=2, pp=2, sp=True), MLP),
        (TIED, "float32", _layout(pp=4), CHUNKS),
        (QWEN3, "float32", _layout(tp=4), {}),
        (SMALL, "float32", _layout(pp=2, overlap=True), FULL),
        (MOE, "float32", _layout(tp=2, sp=True, ep=2), CHUNKS),
    ],
}


def save_case(
    folder: Path, model: str, dtype: str, parallel: dict[str, Any], memory: dict[str, Any]
) -> Path:
    """Write the `sft` config of a case and its model's config.json; returns the config's path."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODELS[model]))
    config = {
        "run_dir": "run",
        "model": {"hf_path": ".", "max_sequence_length": TOKENS},
        "data": {"train": "rows.jsonl"},
        "precision": {"params_dtype": dtype},
        "parallel": parallel,
        "memory": memory,
        "train": {"global_batch_size": 32, "micro_batch_size": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measure(path: Path, world_size: int) -> list[tuple[str, float, float, float]]:
    """Train one update of a case on this rank; returns plan_against_measured's rows."""
    from gdpo_megatron.platform import detect_platform

    platform = detect_platform()
    platform.prepare_megatron()
    import torch
    from megatron.core import parallel_state

    from gdpo_megatron.conversion.hf_io import RandomWeights
    from gdpo_megatron.data.batching import make_micro_batches
    from gdpo_megatron.distributed import mesh as meshes
    from gdpo_megatron.planning.job import load_job
    from gdpo_megatron.planning.measure import measured_state, peak_bytes
    from gdpo_megatron.planning.plan import plan_against_measured
    from gdpo_megatron.policy.megatron_policy import MegatronPolicy
    from gdpo_megatron.policy.optimizer import materialize_state
    from gdpo_megatron.sft import CrossEntropy

    job = load_job(path, [], world_size=world_size, uneven_gathers=False)
    config = job.config
    mesh = meshes.initialize(config.parallel, platform)
    weights = RandomWeights(job.arch, 1)
    policy = MegatronPolicy(
        job.arch,
        optimizer=config.optimizer,
        total_updates=2,
        make_reader=lambda: weights,
        parallel=config.parallel,
        precision=config.precision,
        memory=config.memory,
        max_sequence_length=TOKENS,
        mesh=mesh,
        platform=platform,
    )
    materialize_state(policy.optimizer)
    number = job.rows_per_update // job.dp
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    rows = torch.randint(0, job.arch.vocab_size, (number, TOKENS), generator=generator).tolist()
    batches = make_micro_batches(
        [(row[:1], row[1:]) for row in rows],
        policy.micro_batching(config.train),
        peers=[[TOKENS] * number] * mesh.dp_size,
    )
    loss = CrossEntropy(job.rows_per_update * (TOKENS - 1))
    # The first pass allocates what stays, such as the buffer that tokens are gathered into.
    peak = peak_bytes(lambda: policy._accumulate(batches, loss, 1.0))
    measured = {**measured_state(policy), "activations": peak}
    parallel_state.destroy_model_parallel()
    return plan_against_measured(job, measured, mesh.pp_rank)


def run(world_size: int, cases: list[Any]) -> list[list[Any]]:
    """Measure cases on so many ranks; returns, case by case, the rows of every rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, case in enumerate(cases):
            save_case(folder / f"case_{index}", *case)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world_size}", __file__, "--ranks", name]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1800
        )
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        ranks = [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(world_size)]
    return [[rank[index] for rank in ranks] for index in range(len(cases))]


def table() -> str:
    """All cases as Markdown: of each its rank with the largest error."""
    lines = [
        "| ranks | model | dtype | layout | memory | parameters | gradients | optimizer "
        "| activations: planned | measured | error |",
        "|---:|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for world_size, cases in CASES.items():
        for case, ranks in zip(cases, run(world_size, cases), strict=True):
            worst = max(ranks, key=lambda rows: abs(rows[3][3]))
            exact = all(row[3] == 0 for rows in ranks for row in rows[:3])
            state = [f"{row[2]:,}" + ("" if exact else f" ({row[1]:,})") for row in worst[:3]]
            planned, measured, error = (worst[3][i] for i in (1, 2, 3))
            model, dtype, parallel, memory = case
            cells = [str(world_size), model, dtype, _short(parallel), _short(memory), *state]
            cells += [f"{planned / 2**20:.1f}", f"{measured / 2**20:.1f}", f"{error:+.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def _short(section: dict[str, Any]) -> str:
    """A section of a config in a few words."""
    names = {
        "tensor_model_parallel_size": "TP",
        "pipeline_model_parallel_size": "PP",
        "virtual_pipeline_model_parallel_size": "VP",
        "context_parallel_size": "CP",
        "expert_model_parallel_size": "EP",
        "sequence_parallel": "SP",
        "overlap_grad_reduce": "overlapped",
        "logprob_chunk_tokens": "chunks of ",
        "recompute_granularity": "",
        "recompute_modules": "",
        "recompute_method": "",
        "recompute_num_layers": "",
    }
    words: list[str] = []
    for key, value in section.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        words.append(names[key] + ("" if value is True else text))
    return " ".join(words) or "-"


def main() -> None:
    """Measure, and write the table where the document has the last one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="leave the document as it is")
    parser.add_argument("--ranks", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        folders = sorted(options.ranks.glob("case_*"), key=lambda it: int(it.name[5:]))
        results = [measure(folder / "config.yaml", world_size) for folder in folders]
        (options.ranks / f"rank_{rank}.json").write_text(json.dumps(results))
        return
    found = table()
    if not options.print:
        marks = r"(<!-- measured -->\n).*?(\n<!-- end -->)"
        text = DOCUMENT.read_text()
        assert re.search(marks, text, re.S), f"{DOCUMENT} has no place for the table"
        DOCUMENT.write_text(re.sub(marks, lambda m: m[1] + found + m[2], text, flags=re.S))


if __name__ == "__main__":
    main()
