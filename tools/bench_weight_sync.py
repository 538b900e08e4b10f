"""Weight sync: seconds against a plain copy of the same bytes, memory, and what the proof costs.

A random model of about 50 M parameters is synced from every layout to one engine per rank, each
layout in processes of its own. The floor is measured in the same process, on all ranks at once as
the sync is: one `copy_` of all tensors to memory that is there already, which is the least that an
engine with weights of its own must do. Times are medians over the repetitions; memory is the
kernel's VmHWM during syncs above VmRSS before them, the engine's weights being there in both.

    OMP_NUM_THREADS=1 python tools/bench_weight_sync.py

With --run it measures what the proof costs in training: the quickstart's task, with its model and
one of 47 M parameters, by the command that users type. Every other sync has all checks; what these
take longer than the others, over the seconds of a step and the default interval, is the share. All
of it is from one run, in which checked and unchecked steps alternate.

    OMP_NUM_THREADS=1 python tools/bench_weight_sync.py --run [--engine vllm]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_memory import forget_peak, held

MIB = 2**20
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1 rank": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
CHECKS = {
    "sync": (0, 0),
    "with checksums": (1, 0),
    "with canary": (0, 1),
}
"""Case -> (checksum_interval, canary.interval)."""


EVERY = 2  # syncs from one that is checked to the next, with --run
RUNS: dict[str, tuple[dict[str, int], int, int]] = {
    "quickstart": ({}, 16, 14),
    "47 M": (
        {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        4,
        8,
    ),
}
"""Name -> (changes of the quickstart's model, prompts of a step, steps)."""


def rank(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """What one rank measures."""
    from gdpo_megatron.platform import detect_platform

    platform = detect_platform()
    platform.prepare_megatron()
    import torch
    import torch.distributed as dist

    import gdpo_megatron.rollout.engines  # noqa: F401  # registers them
    from gdpo_megatron.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
    from gdpo_megatron.config.vllm import VllmConfig
    from gdpo_megatron.config.weight_sync import CanaryConfig, WeightSyncConfig
    from gdpo_megatron.conversion.families import load_architecture
    from gdpo_megatron.conversion.hf_io import RandomWeights
    from gdpo_megatron.data.tokenizer import load_tokenizer
    from gdpo_megatron.distributed import mesh as meshes
    from gdpo_megatron.policy.model import MegatronModel
    from gdpo_megatron.rollout.base import EngineSetup, engines
    from gdpo_megatron.types import Prompt
    from gdpo_megatron.weight_sync import Canary, WeightSync, tolerance_of

    torch.set_num_threads(1)
    parallel, dtype = ParallelConfig(**case["layout"]), case["dtype"]
    mesh, arch = meshes.initialize(parallel, platform), load_architecture(folder)
    policy = MegatronModel(
        arch,
        parallel=parallel,
        precision=PrecisionConfig(params_dtype=dtype),
        max_sequence_length=128,
        mesh=mesh,
        platform=platform,
    )
    policy.load_hf(RandomWeights(arch, 1))
    policy.freeze()
    engine_mesh = meshes.engine_mesh(mesh, 1)
    setup = EngineSetup(
        arch=arch,
        tokenizer=load_tokenizer(folder),
        model_files=folder,
        mesh=engine_mesh,
        platform=platform,
        dtype=getattr(torch, dtype),
        max_sequence_length=128,
        max_concurrent_sequences=8,
        seed=1,
        vllm=VllmConfig(),
    )
    engine = engines.get(case["engine"])(setup)
    engine.wake()
    prompts = [Prompt(prompt_id=str(i), token_ids=tuple(range(5, 69)), text="") for i in range(4)]

    def sync(checksum_interval: int, canary_interval: int) -> WeightSync:
        canary = CanaryConfig(interval=canary_interval)
        config = WeightSyncConfig(
            bucket_mb=case["bucket_mb"], checksum_interval=checksum_interval, canary=canary
        )
        return WeightSync(
            config,
            policy,
            engine,
            Canary(
                canary,
                prompts,
                policy=policy,
                engine=engine,
                engines=engine_mesh,
                batching=policy.micro_batching(TrainConfig()),
                temperature=1.0,
                max_sequence_length=128,
                seed=1,
                tolerance=tolerance_of(canary, dtype),
            ),
        )

    def seconds(call: Callable[[], object]) -> float:
        times: list[float] = []
        for _ in range(case["repeats"]):
            dist.barrier()
            began = time.perf_counter()
            call()
            platform.synchronize()
            dist.barrier()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    result: dict[str, Any] = {}
    version = 0

    def run(job: WeightSync) -> None:
        nonlocal version
        version += 1
        job.run(version)

    jobs = {name: sync(*intervals) for name, intervals in CHECKS.items()}
    for job in jobs.values():
        run(job)  # memory and caches are there from now on
    before = held()["now"]
    forget_peak()
    run(jobs["sync"])
    result["peak"] = held()["peak"] - before
    for name, job in jobs.items():
        result[name] = seconds(lambda job=job: run(job))
    tensors = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)

    copy()
    result["floor"] = seconds(copy)
    result["bytes"] = sum(tensor.nbytes for tensor in tensors.values())
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, result["peak"])
    result["peak"] = max(peaks)
    dist.destroy_process_group()
    return result


def launch(folder: Path, world_size: int, case: dict[str, Any]) -> dict[str, Any]:
    """Measure a case; returns the result of rank 0."""
    (folder / "case.json").write_text(json.dumps(case))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", __file__, "--rank", str(folder)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if case["memory"]:
        # What is freed goes back to the kernel, whose figure is then what is held; it costs time.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(MIB // 4)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads((folder / "result.json").read_text())


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes: the engine wants one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def run_share(name: str, engine: str, nproc: int) -> dict[str, float]:
    """Train, and compare the steps whose sync was checked with the others."""
    from gdpo_megatron.config.weight_sync import WeightSyncConfig

    usual = WeightSyncConfig()
    assert usual.checksum_interval == usual.canary.interval, "one share of both"
    changes, num_prompts, num_steps = RUNS[name]
    script = Path(__file__).parents[1] / "examples/quickstart/make_data.py"
    spec = importlib.util.spec_from_file_location("make_data", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        module.make_quickstart_data(folder, seed=1)
        model = folder / "model/config.json"
        model.write_text(json.dumps(json.loads(model.read_text()) | changes))
        rewards = ("format", "correctness")
        config = {
            "run_dir": "run",
            "model": {"hf_path": "model", "init": "random", "max_sequence_length": 128},
            "data": {"train": "train.jsonl"},
            "rewards": [{"name": it, "type": f"tool_call_{it}"} for it in rewards],
            "rollout": {
                "engine": engine,
                "num_prompts_per_step": num_prompts,
                "group_size": 8,
                "max_completion_tokens": 48,
            },
            "weight_sync": {"checksum_interval": EVERY, "canary": {"interval": EVERY}},
            "optimizer": {"lr": 1e-4, "weight_decay": 0.0},
            "train": {
                "num_steps": num_steps,
                "num_minibatches_per_step": 2,
                "micro_batch_size": 32,
            },
            "checkpoint": {"save_interval": 0, "export_hf": False},
            "logging": {"tensorboard": False},
        }
        (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML too
        command = [sys.executable, "-m", "gdpo_megatron.cli", "train"]
        command += [str(folder / "config.yaml"), "--nproc", str(nproc)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        if done.returncode:
            raise SystemExit(done.stdout[-4000:] + done.stderr[-4000:])
        lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    # The first two syncs are checked by all means, and the first steps are not like the others.
    steps = [json.loads(line) for line in lines][2:]

    def median(key: str, checked: bool) -> float:
        rows = [it for it in steps if ("weight_sync/canary_seconds" in it) == checked]
        return statistics.median(it[key] for it in rows)

    syncs = [median("time/weight_sync_seconds", checked) for checked in (False, True)]
    step = median("time/step_seconds", False)
    return {
        "step": step,
        "sync": syncs[0],
        "checks": syncs[1] - syncs[0],
        "share": (syncs[1] - syncs[0]) / usual.canary.interval / step,
    }


def print_shares(engine: str, nproc: int) -> None:
    """Print the table of --run."""
    print(f"{nproc} ranks, {os.cpu_count()} cores\n")
    print("| engine | model | step s | sync s | all checks s | share of a step at the default |")
    print("|---|---|---:|---:|---:|---:|")
    for name in RUNS:
        it = run_share(name, engine, nproc)
        print(
            f"| {engine} | {name} | {it['step']:.2f} | {it['sync']:.3f} | {it['checks']:+.3f} "
            f"| {it['share']:.3%} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--engine", default="native", help="a registered rollout engine")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bucket-mb", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="default: all")
    parser.add_argument("--tiny", action="store_true", help="to see that the tool works")
    parser.add_argument("--run", action="store_true", help="what the proof costs in training")
    parser.add_argument("--nproc", type=int, default=2, help="ranks, with --run")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measured = rank(options.rank, json.loads((options.rank / "case.json").read_text()))
        if os.environ["RANK"] == "0":
            (options.rank / "result.json").write_text(json.dumps(measured))
        return
    if options.run:
        print_shares(options.engine, options.nproc)
        return
    model = MODEL | ({"num_hidden_layers": 2, "vocab_size": 512} if options.tiny else {})
    print(
        f"engine {options.engine}, {options.dtype}, buckets of {options.bucket_mb} MiB, "
        f"{os.cpu_count()} cores\n"
    )
    print("| layout | MiB | floor s | sync s | x floor | peak MiB | checksums s | canary s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(model))
        write_tokenizer(folder)
        for layout in options.layout or LAYOUTS:
            world_size, sizes = LAYOUTS[layout]
            case = {
                "layout": sizes,
                "engine": options.engine,
                "dtype": options.dtype,
                "bucket_mb": options.bucket_mb,
                "repeats": options.repeats,
            }
            it = launch(folder, world_size, case | {"memory": False})
            peak = launch(folder, world_size, case | {"memory": True, "repeats": 1})["peak"]
            plain = it["sync"]
            print(
                f"| {layout} | {it['bytes'] / MIB:.0f} | {it['floor']:.3f} | {plain:.3f} "
                f"| {plain / it['floor']:.1f} | {peak / MIB:.0f} "
                f"| {it['with checksums'] - plain:+.3f} | {it['with canary'] - plain:+.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
