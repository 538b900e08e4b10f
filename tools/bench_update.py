"""Tokens per second and peak memory of an update, against a plain transformers and AdamW loop.

All variants train the same model (Qwen2's layers, random weights, float32) on the same rows with
the same optimizer and number of threads, each in a process of its own, one after the other.
Completion lengths are drawn from a log-normal distribution, as those of stories are: most are
short, a few are long. A token counts once, whatever padding is computed beside it.

    OMP_NUM_THREADS=1 python tools/bench_update.py [--updates 5] [--threads 1] [--tiny]

On a machine that others use too, look at the processor's time and not at the clock's. The first
update is a warm-up; its loss shows that all variants compute the same.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdpo_megatron.worker import leave_out_warnings

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
TINY = {**CONFIG, "hidden_size": 48, "intermediate_size": 96, "vocab_size": 512}

NUM_ROWS, MAX_TOKENS = 64, 512
MICRO_BATCH_SIZE, BUDGET = 8, 1024
LR, WEIGHT_DECAY, BETAS, EPS, MAX_NORM = 1e-4, 0.01, (0.9, 0.95), 1e-8, 1.0

Row = tuple[list[int], list[int]]
# name -> keys of `train`; None: the plain loop, its rows sorted by length or as they come.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "transformers": None,
    "transformers, sorted rows": None,
    "padded rows": {"micro_batch_size": MICRO_BATCH_SIZE},
    "padded, token budget": {"max_tokens_per_micro_batch": BUDGET},
    "packed, token budget": {"max_tokens_per_micro_batch": BUDGET, "packing": True},
}


def make_rows(vocab_size: int) -> list[Row]:
    """Rows of prompt and completion; the same for every variant."""
    draw = random.Random(3)
    rows: list[Row] = []
    for _ in range(NUM_ROWS):
        prompt = draw.randint(8, 32)
        completion = min(MAX_TOKENS - prompt, max(4, round(draw.lognormvariate(math.log(60), 0.8))))
        tokens = [draw.randrange(vocab_size) for _ in range(prompt + completion)]
        rows.append((tokens[:prompt], tokens[prompt:]))
    return rows


def plain(folder: Path, rows: list[Row], sort: bool) -> Callable[[], tuple[float, float]]:
    """An update of transformers' model: micro-batches of rows, padded, gradients added up."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
    )
    num_loss_tokens = sum(len(completion) for _, completion in rows)
    if sort:
        rows = sorted(rows, key=lambda row: -len(row[0]) - len(row[1]))

    def update() -> tuple[float, float]:
        total, computed = 0.0, 0
        for start in range(0, len(rows), MICRO_BATCH_SIZE):
            part = rows[start : start + MICRO_BATCH_SIZE]
            longest = max(len(prompt) + len(completion) for prompt, completion in part)
            shape = (len(part), longest)
            tokens = torch.zeros(shape, dtype=torch.int64)
            labels = torch.full(shape, -100)
            mask = torch.zeros(shape, dtype=torch.int64)
            for i, (prompt, completion) in enumerate(part):
                end = len(prompt) + len(completion)
                tokens[i, :end] = torch.tensor(prompt + completion)
                labels[i, len(prompt) : end] = torch.tensor(completion)
                mask[i, :end] = 1
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            loss = loss / num_loss_tokens
            loss.backward()
            total, computed = total + float(loss.detach()), computed + math.prod(shape)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return total, 1 - sum(len(p) + len(c) for p, c in rows) / computed

    return update


def ours(folder: Path, rows: list[Row], train: dict[str, Any]) -> Callable[[], tuple[float, float]]:
    """The policy's update as `sft` runs it."""
    from gdpo_megatron.platform import detect_platform

    platform = detect_platform()
    platform.prepare_megatron()

    from gdpo_megatron.config.schema import (
        OptimizerConfig,
        ParallelConfig,
        PrecisionConfig,
        TrainConfig,
    )
    from gdpo_megatron.conversion.families import load_architecture
    from gdpo_megatron.conversion.model_folder import open_checkpoint
    from gdpo_megatron.data.batching import make_micro_batches
    from gdpo_megatron.distributed.mesh import initialize
    from gdpo_megatron.policy.megatron_policy import MegatronPolicy
    from gdpo_megatron.sft import CrossEntropy

    config, parallel, arch = TrainConfig(**train), ParallelConfig(), load_architecture(folder)
    policy = MegatronPolicy(
        arch,
        optimizer=OptimizerConfig(
            lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM
        ),
        total_updates=100,
        make_reader=lambda: open_checkpoint(folder, arch),
        parallel=parallel,
        precision=PrecisionConfig(),
        max_sequence_length=MAX_TOKENS,
        mesh=initialize(parallel, platform),
        platform=platform,
        packing=config.packing,
    )
    batching = policy.micro_batching(config)
    loss = CrossEntropy(sum(len(completion) for _, completion in rows))

    def update() -> tuple[float, float]:
        stats = policy.update(make_micro_batches(rows, batching), loss, temperature=1.0)
        return stats["loss"], stats["padding_share"]

    return update


def measure(name: str, folder: Path, updates: int, threads: int) -> dict[str, float]:
    """Run a variant in this process."""
    import torch

    torch.set_num_threads(threads)
    rows = make_rows(json.loads((folder / "config.json").read_text())["vocab_size"])
    train = VARIANTS[name]
    update = plain(folder, rows, "sorted" in name) if train is None else ours(folder, rows, train)
    built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss, padding = update()
    wall: list[float] = []
    processor: list[float] = []
    for _ in range(updates):
        began, began_processor = time.perf_counter(), time.process_time()
        update()
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - began_processor)
    num_tokens = sum(len(prompt) + len(completion) for prompt, completion in rows)
    return {
        "tokens_per_second": num_tokens / statistics.median(wall),
        "tokens_per_processor_second": num_tokens / statistics.median(processor),
        "padding": padding,
        "built_mib": built / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": loss,
    }


def leave() -> None:
    """End the process group, whose threads must not outlive the interpreter."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**config)).save_pretrained(folder)


def main() -> None:
    """Measure every variant in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--updates", type=int, default=5, help="timed updates of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="to see that the tool works")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        leave_out_warnings()
        result = measure(options.variant, options.folder, options.updates, options.threads)
        (options.folder / f"{options.variant}.json").write_text(json.dumps(result))
        leave()
        return
    rows = make_rows(CONFIG["vocab_size"])
    lengths = sorted(len(prompt) + len(completion) for prompt, completion in rows)
    print(
        f"{len(rows)} rows of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{lengths[len(lengths) // 2]}, together {sum(lengths)}), {MICRO_BATCH_SIZE} rows or "
        f"{BUDGET} tokens a micro-batch, {options.threads} threads, {options.updates} updates\n"
    )
    print("| variant | tokens/s | tokens/s of processor time | padding | peak MiB | first loss |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, TINY if options.tiny else CONFIG)
        for variant in VARIANTS:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            words = ["--variant", variant, "--folder", name, "--updates", str(options.updates)]
            words += ["--threads", str(options.threads)]
            subprocess.run([*launch, "--nproc-per-node=1", __file__, *words], check=True)
            it = json.loads((folder / f"{variant}.json").read_text())
            print(
                f"| {variant} | {it['tokens_per_second']:.0f} "
                f"| {it['tokens_per_processor_second']:.0f} | {it['padding']:.1%} "
                f"| {it['peak_mib']:.0f} | {it['first_loss']:.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
