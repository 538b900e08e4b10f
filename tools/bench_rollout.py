"""Tokens per second of rollouts: our engines, vLLM by itself and transformers' generate.

All variants answer the same prompts with the same model (layers of Qwen3, random weights, float32),
number of tokens and of threads, at temperature 1, each in a process of its own, one after another.
No token ends a sequence, so that every completion has all its tokens. The engines give a log-prob
with each token; `generate` only draws. The mean log-prob shows that all draw from the same
distribution (for `generate` it is computed afterwards).

    OMP_NUM_THREADS=1 python tools/bench_rollout.py [--threads 1] [--model 2.6M] [--tiny]

Run it in the environment that has vLLM (scripts/setup.sh vllm), else those rows stay empty. On a
machine that others use too, look at the processor's time and not at the clock's. The first round
is a warm-up; of the others the fastest counts, for the clock and for the processor.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_weight_sync import write_tokenizer

from gdpo_megatron.worker import leave_out_warnings

COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.1,  # the next token is then far from uniform
}
SHAPES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES += ("num_key_value_heads", "head_dim", "vocab_size")
# Head sizes are those that vLLM's attention on CPUs takes.
MODELS: dict[str, tuple[int, ...]] = {
    "0.26M": (64, 172, 5, 2, 1, 32, 512),
    "2.6M": (256, 432, 4, 4, 2, 64, 2048),
    "50M": (512, 1536, 12, 8, 4, 64, 24576),
}
"""Name -> SHAPES."""
TINY = (64, 96, 2, 2, 1, 32, 300)

NUM_GROUPS, GROUP_SIZE, PROMPT_TOKENS = 4, 8, 32
KV_CACHE_GIB = 0.5
SEED = 7

Prompts = list[tuple[int, ...]]
LogProbs = list[list[float]]
# (number of a round, for its noise -> what it answers, an answer -> log-probs of its tokens).
Variant = tuple[Callable[[int], Any], Callable[[Any], LogProbs]]


def make_prompts(vocab_size: int) -> Prompts:
    """Prompts, equal ones of a group side by side; the same for every variant."""
    draw = random.Random(3)
    prompts = [
        tuple(draw.randrange(vocab_size) for _ in range(PROMPT_TOKENS)) for _ in range(NUM_GROUPS)
    ]
    return [prompt for prompt in prompts for _ in range(GROUP_SIZE)]


def in_loop(name: str) -> Callable[[Path, Prompts, int], Variant]:
    """An engine of ours, with weights synced, as a run drives it."""

    def build(folder: Path, prompts: Prompts, num_tokens: int) -> Variant:
        import torch

        import gdpo_megatron.rollout.engines  # noqa: F401  # registers them
        from gdpo_megatron.config.vllm import VllmConfig
        from gdpo_megatron.conversion.families import load_architecture
        from gdpo_megatron.conversion.hf_io import HFCheckpoint
        from gdpo_megatron.conversion.mapping import hf_shapes
        from gdpo_megatron.data.tokenizer import load_tokenizer
        from gdpo_megatron.distributed.mesh import EngineMesh
        from gdpo_megatron.platform import detect_platform
        from gdpo_megatron.rollout.base import (
            EngineSetup,
            RolloutRequest,
            SamplingParams,
            engines,
            generate,
            noise_key,
        )

        platform = detect_platform()
        platform.setup(0)
        torch.distributed.init_process_group(platform.backend)
        arch = load_architecture(folder)
        engine = engines.get(name)(
            EngineSetup(
                arch=arch,
                tokenizer=load_tokenizer(folder),
                model_files=folder,
                mesh=EngineMesh(replica=0, num_replicas=1, tp_rank=0, tp_size=1, tp_group=None),
                platform=platform,
                dtype=torch.float32,
                max_sequence_length=PROMPT_TOKENS + num_tokens,
                max_concurrent_sequences=len(prompts),
                seed=SEED,
                vllm=VllmConfig(kv_cache_gib=KV_CACHE_GIB),
            )
        )
        engine.wake()
        reader = HFCheckpoint(folder, arch)
        engine.load_weights(((it, reader.get(it)) for it in hf_shapes(arch)), version=0)
        sampling = SamplingParams.unrestricted(num_tokens)

        def answer(number: int) -> Any:
            requests = [
                RolloutRequest(
                    request_id=i,
                    prompt_token_ids=prompt,
                    noise_key=noise_key(SEED, "bench", number, i, 0),
                )
                for i, prompt in enumerate(prompts)
            ]
            return generate(engine, requests, sampling)

        return answer, lambda done: [list(it.completion.logprobs) for it in done]

    return build


def standalone(folder: Path, prompts: Prompts, num_tokens: int) -> Variant:
    """VLLM's own generate in this process, with the settings of our engine."""
    from gdpo_megatron.rollout.vllm_engine.environment import prepare

    prepare()
    import torch
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    current_platform.simple_compile_backend = "eager"
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=torch.float32,
        seed=SEED,
        max_model_len=PROMPT_TOKENS + num_tokens,
        max_num_seqs=len(prompts),
        kv_cache_memory_bytes=int(KV_CACHE_GIB * 2**30),
        enforce_eager=True,
        enable_prefix_caching=True,
        # As in our loop; the default one schedules ahead in another thread.
        distributed_executor_backend="external_launcher",
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
    )

    def answer(number: int) -> Any:
        sampling = [
            SamplingParams(
                temperature=1.0,
                max_tokens=num_tokens,
                ignore_eos=True,
                seed=number * len(prompts) + i,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return llm.generate(inputs, sampling, use_tqdm=False)

    return answer, lambda done: [list(it.outputs[0].logprobs.logprobs) for it in done]


def transformers_generate(folder: Path, prompts: Prompts, num_tokens: int) -> Variant:
    """One static batch with a cache; all prompts have one length, so nothing is padding."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from gdpo_megatron.platform import detect_platform

    disable_progress_bar()
    set_verbosity_error()
    platform = detect_platform()
    platform.setup(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.eval().to(platform.device)
    tokens = torch.tensor(prompts, device=platform.device)
    mask = torch.ones_like(tokens)

    def answer(number: int) -> Any:
        torch.manual_seed(number)
        done = model.generate(
            tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=num_tokens,
            use_cache=True,
            pad_token_id=0,
        )
        return done.cpu()

    @torch.no_grad()
    def logprobs_of(done: Any) -> LogProbs:
        done = done.to(platform.device)
        logits = model(done[:, :-1], logits_to_keep=num_tokens).logits
        drawn = done[:, PROMPT_TOKENS:].unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, drawn).squeeze(-1).tolist()

    return answer, logprobs_of


NATIVE, STANDALONE, VLLM, GENERATE = "native", "vLLM standalone", "vLLM in our loop", "generate"
VARIANTS: dict[str, Callable[[Path, Prompts, int], Variant]] = {
    GENERATE: transformers_generate,
    NATIVE: in_loop("native"),
    STANDALONE: standalone,
    VLLM: in_loop("vllm"),
}
RATIOS = (NATIVE, GENERATE, 1.5), (VLLM, STANDALONE, 0.95)
"""(variant, what it is divided by, the aim)."""


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run a variant in this process."""
    import torch

    torch.set_num_threads(options.threads)
    prompts = make_prompts(json.loads((folder / "config.json").read_text())["vocab_size"])
    answer, logprobs_of = VARIANTS[name](folder, prompts, options.tokens)
    wall, processor, done = math.inf, math.inf, answer(0)
    for number in range(1, options.rounds + 1):
        began, began_processor = time.perf_counter(), time.process_time()
        done = answer(number)
        wall = min(wall, time.perf_counter() - began)
        processor = min(processor, time.process_time() - began_processor)
    logprobs = logprobs_of(done)
    if [len(row) for row in logprobs] != [options.tokens] * len(prompts):
        raise RuntimeError(f"{name}: {[len(row) for row in logprobs]} tokens")
    num_tokens = options.tokens * len(prompts)
    return {
        "clock": num_tokens / wall,
        "processor": num_tokens / processor,
        "logprob": sum(map(sum, logprobs)) / num_tokens,
    }


def leave() -> None:
    """End the process group, whose threads must not outlive the interpreter."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def make_model(folder: Path, shape: tuple[int, ...]) -> int:
    """Write random weights as a Hugging Face folder; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = {**COMMON, **dict(zip(SHAPES, shape, strict=True))}
    model: Any = AutoModelForCausalLM.from_config(Qwen3Config(**config))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def launch(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, float] | None:
    """Measure a variant in a process of its own; None where vLLM is not installed."""
    if variant in (STANDALONE, VLLM) and importlib.util.find_spec("vllm") is None:
        return None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += [__file__, "--variant", variant, "--folder", str(folder)]
    for name in ("rounds", "threads", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads((folder / f"{variant}.json").read_text())


def bench(model: str, options: argparse.Namespace) -> list[str]:
    """Print the rows of a model; returns those of its ratios."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_parameters = make_model(folder, TINY if options.tiny else MODELS[model])
        label = f"{model} ({num_parameters / 1e6:.2f} M)"
        for variant in VARIANTS:
            it = launch(variant, folder, options)
            if it is None:
                print(f"| {label} | {variant} | not installed | | |", flush=True)
                continue
            found[variant] = it
            print(
                f"| {label} | {variant} | {it['clock']:.0f} | {it['processor']:.0f} "
                f"| {it['logprob']:.3f} |",
                flush=True,
            )
    return [
        f"| {label} | {one} / {other} | {found[one]['clock'] / found[other]['clock']:.2f} "
        f"| {found[one]['processor'] / found[other]['processor']:.2f} | {aim} |"
        for one, other, aim in RATIOS
        if one in found and other in found
    ]


def main() -> None:
    """Measure every variant with every model and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="of each completion")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--tiny", action="store_true", help="to see that the tool works")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        leave_out_warnings()
        result = measure(options.variant, options.folder, options)
        (options.folder / f"{options.variant}.json").write_text(json.dumps(result))
        leave()
        return
    models = ["tiny"] if options.tiny else options.model or list(MODELS)
    print(
        f"{NUM_GROUPS} groups of {GROUP_SIZE} completions of {options.tokens} tokens, prompts of "
        f"{PROMPT_TOKENS}; {options.threads} threads on {os.cpu_count()} cores; the fastest of "
        f"{options.rounds} rounds\n"
    )
    print(f"| model | {' | '.join(name.replace('_', ' ') for name in SHAPES)} |")
    print("|---" * (len(SHAPES) + 1) + "|")
    for model in models:
        shape = TINY if options.tiny else MODELS[model]
        print(f"| {model} | {' | '.join(map(str, shape))} |")
    print("\n| model | variant | tokens/s | tokens/s of processor time | mean log-prob |")
    print("|---|---|---:|---:|---:|")
    ratios = [row for model in models for row in bench(model, options)]
    print("\n| model | ratio | by the clock | by processor time | aim |")
    print("|---|---|---:|---:|---:|")
    print("\n".join(ratios))


if __name__ == "__main__":
    main()
