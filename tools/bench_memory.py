"""Peak memory of an update and of what is held between updates, with the keys of `memory`.

A random model is trained for one update, each case in processes of its own. Memory is what the
kernel says of a rank: VmHWM (the peak) and VmRSS (now) of /proc/self/status. An update's figure is
its peak above what the rank held before it: weights, gradients and optimizer state are there in
either case. Every case computes the same losses, which is checked.

    OMP_NUM_THREADS=1 python tools/bench_memory.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
WIDE = {**MODEL, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8}
ROWS, TOKENS = 4, 512
CHUNKS = {"logprob_chunk_tokens": 256}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1, "recompute_method": "uniform"}


UPDATES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "logprob_chunk_tokens 256": CHUNKS,
    "256, selective: mlp": CHUNKS | MLP,
    "256, full: block 3 of 6": CHUNKS
    | {**FULL, "recompute_method": "block", "recompute_num_layers": 3},
    "256, full: uniform 1": CHUNKS | FULL,
}


def held() -> dict[str, int]:
    """Bytes of this process: now, without what malloc keeps free; and at most since forget_peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        kind: int(fields[name].split()[0]) * 1024
        for kind, name in (("now", "VmRSS"), ("peak", "VmHWM"))
    }


def forget_peak() -> None:
    """Let the kernel's peak start at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def rank(case: dict[str, Any]) -> dict[str, Any]:
    """What one rank measures."""
    from gdpo_megatron.platform import detect_platform

    platform = detect_platform()
    platform.prepare_megatron()
    import torch
    import torch.distributed as dist

    from gdpo_megatron.config.memory import MemoryConfig
    from gdpo_megatron.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
    from gdpo_megatron.conversion.families import load_architecture
    from gdpo_megatron.conversion.hf_io import RandomWeights
    from gdpo_megatron.data.batching import make_micro_batches
    from gdpo_megatron.data.micro_batching import MicroBatching
    from gdpo_megatron.distributed import mesh as meshes
    from gdpo_megatron.policy.megatron_policy import MegatronPolicy
    from gdpo_megatron.policy.model import MegatronModel
    from gdpo_megatron.policy.swapped import SwappedReference
    from gdpo_megatron.sft import CrossEntropy

    mesh = meshes.initialize(ParallelConfig(), platform)
    arch = load_architecture(Path(case["model"]))
    weights = RandomWeights(arch, 1)
    layout: dict[str, Any] = {
        "parallel": ParallelConfig(),
        "precision": PrecisionConfig(),
        "max_sequence_length": TOKENS,
        "mesh": mesh,
        "platform": platform,
        "memory": MemoryConfig(**case["memory"]),
    }
    policy = MegatronPolicy(
        arch,
        optimizer=OptimizerConfig(),
        total_updates=2,
        make_reader=lambda: weights,
        **layout,
    )
    tokens = torch.randint(
        0, arch.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(2)
    )

    def batches(rows: int, length: int) -> Any:
        pairs = [(row[:1].tolist(), row[1:length].tolist()) for row in tokens[:rows]]
        return make_micro_batches(pairs, MicroBatching(micro_batch_size=ROWS))

    result: dict[str, Any] = {}
    if case["kind"] == "reference":
        policy.logprobs(batches(1, 8), 1.0)
        before = held()["now"]
        if case["swap"]:
            reference: Any = SwappedReference(policy)
        else:
            reference = MegatronModel(arch, **layout)
            reference.load_hf(weights)
            reference.freeze()
        values = reference.logprobs(batches(1, 8), 1.0)
        result["held"] = held()["now"] - before
        result["loss"] = float(values[0].sum())
    else:
        # The optimizer's state is there from the first step on.
        policy.update(batches(1, 8), CrossEntropy(7), temperature=1.0)
        before = held()["now"]
    if case["kind"] == "free":
        policy.free_grad_buffers()
        result["held"] = held()["now"] - before
    if case["kind"] == "update":
        forget_peak()
        began = time.process_time()
        num_tokens = ROWS * (TOKENS - 1)
        stats = policy.update(batches(ROWS, TOKENS), CrossEntropy(num_tokens), temperature=1.0)
        result["seconds"] = time.process_time() - began
        result["peak"], result["loss"] = held()["peak"] - before, stats["loss"]
    dist.destroy_process_group()
    return result


def run(model: dict[str, Any], world_size: int = 1, **case: Any) -> dict[str, Any]:
    """Measure a case; returns the result of rank 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(model))
        (folder / "case.json").write_text(json.dumps({"model": name, "memory": {}, **case}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world_size}", __file__, "--rank", name]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        return json.loads((folder / "result.json").read_text())


def main() -> None:
    """Print all tables."""
    num_tokens = ROWS * TOKENS
    logits = num_tokens * MODEL["vocab_size"] * 4 / MIB
    print(
        f"update: {num_tokens} tokens, vocabulary {MODEL['vocab_size']}, "
        f"{MODEL['num_hidden_layers']} layers of {MODEL['hidden_size']}; "
        f"all logits in float32 are {logits:.0f} MiB\n"
    )
    print("| memory | peak of the update, MiB | CPU seconds | loss |\n|---|---:|---:|---:|")
    losses: list[float] = []
    for name, memory in UPDATES.items():
        found = run(MODEL, kind="update", memory=memory)
        losses.append(found["loss"])
        peak, seconds, loss = found["peak"] / MIB, found["seconds"], found["loss"]
        print(f"| {name} | {peak:.0f} | {seconds:.1f} | {loss:.6f} |", flush=True)
    assert max(losses) - min(losses) < 1e-5, losses

    print("\n| between updates | MiB of a rank |\n|---|---:|")
    found = run(WIDE, kind="free")
    print(f"| free_grad_buffers_during_rollout | {found['held'] / MIB:+.0f} |", flush=True)
    references: list[float] = []
    for swap in (False, True):
        for world_size in (1, 2):
            found = run(WIDE, world_size, kind="reference", swap=swap)
            references.append(found["loss"])
            name = f"reference: {'swap' if swap else 'separate'}, DP {world_size}"
            print(f"| {name} | {found['held'] / MIB:+.0f} |", flush=True)
    assert len(set(references)) == 1, references


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is None:
        main()
    else:
        measured = rank(json.loads((options.rank / "case.json").read_text()))
        if os.environ["RANK"] == "0":
            (options.rank / "result.json").write_text(json.dumps(measured))
