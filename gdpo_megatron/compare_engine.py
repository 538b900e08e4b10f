"""At which layer a rollout engine first differs from the trainer's model.

The Megatron model of a folder is built on one rank and gives the engine its weights as in training.
The engine then completes prompts, one at a time; what it computes on the way, for each token of
prompt and completion, is laid beside what the Megatron model computes for the same tokens.

Exit codes: 0 no difference beyond rounding, 1 there is one, 2 bad input (one line).
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdpo_megatron.checkpoint_cli import positive
from gdpo_megatron.config.schema import MicroBatchConfig
from gdpo_megatron.config.vllm import VllmConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.checks import DTYPES
from gdpo_megatron.conversion.model_folder import Checkpoint, model_files
from gdpo_megatron.data.batching import make_micro_batches
from gdpo_megatron.data.tokenizer import load_tokenizer
from gdpo_megatron.errors import InputError
from gdpo_megatron.layer_values import (
    LIMITS,
    Comparison,
    PointValues,
    Recorder,
    compare_values,
    join_alone,
    megatron_model,
    open_model,
    read_prompts,
    record_megatron,
    record_transformers,
    relative_gap,
    table_lines,
    transformers_model,
)
from gdpo_megatron.platform import Platform, detect_platform
from gdpo_megatron.rollout.base import (
    EngineSetup,
    RolloutRequest,
    SamplingParams,
    engines,
    generate,
    noise_key,
)
from gdpo_megatron.rollout.observe import FINAL_NORM, LOGITS, ObservableEngine

if TYPE_CHECKING:  # which needs Megatron
    from gdpo_megatron.policy.model import MegatronModel

LOGPROBS = "log-probs"
"""Of a completion's tokens: what the engine reported, and what an update would start from."""

_VERSION = 1
_BLOCK = 128  # tokens of a block of an engine's cache, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineComparison:
    """What engine and Megatron model made of the same tokens.

    Args:
        rows: in the order of the forward pass, then LOGPROBS.
        places: for each row the first (prompt, token) whose difference is beyond what is allowed,
            counted from 0 over prompt and completion; absent where there is none.
        prompt_lengths: of the prompts.
        num_tokens: of prompts and completions.
    """

    rows: list[Comparison]
    places: dict[str, tuple[int, int]]
    prompt_lengths: list[int]
    num_tokens: int

    @property
    def first(self) -> Comparison | None:
        """The first row that is beyond what is allowed."""
        return next((row for row in self.rows if row.name in self.places), None)


@dataclass(frozen=True, slots=True)
class _Observed:
    """What an engine did: values are those of the tokens that it was given or drew, in order."""

    completions: list[tuple[int, ...]]
    values: PointValues


def compare_engine(
    policy: MegatronModel,
    engine: Any,
    folder: Path,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    limit: float | None = None,
) -> EngineComparison:
    """Give an engine the policy's weights, and compare both on prompts and their completions.

    The engine is asleep afterwards. Transformers' model is then built beside the policy, in float64
    with 8 bytes for each parameter.

    Args:
        policy: MegatronModel with the folder's weights, on one rank.
        engine: RolloutEngine that is an ObservableEngine, of the same number format.
        folder: the model's.
        checkpoint: its weights.
        prompts: token ids.
        num_tokens: of each completion.
        limit: relative difference that is allowed; None means `Comparison.allowed`.
    """
    dtype = policy.config.params_dtype
    engine.wake()
    engine.load_weights(policy.hf_tensors(), _VERSION)
    observed = _observe(engine, prompts, num_tokens)
    engine.sleep()
    pairs = list(zip(prompts, observed.completions, strict=True))
    # Nobody computes anything for the last token.
    sequences = [[*prompt, *completion][:-1] for prompt, completion in pairs]
    for point, values in observed.values.items():
        if point not in (FINAL_NORM, LOGITS, LOGPROBS):
            counts = [len(x) for x in values], [len(tokens) for tokens in sequences]
            if counts[0] != counts[1]:
                raise RuntimeError(f"{point}: engine reported {counts[0]} tokens, not {counts[1]}")
    expected = record_megatron(policy, sequences)
    expected[LOGPROBS] = [_policy_logprobs(policy, *pair) for pair in pairs]
    theirs = transformers_model(folder, checkpoint, policy.arch, dtype).to(policy.platform.device)
    single = record_transformers(theirs, sequences)
    double = record_transformers(theirs.double(), sequences)
    for them in (single, double):
        them[LOGPROBS] = [
            _logprobs_of(logits, completion)
            for logits, completion in zip(them[LOGITS], observed.completions, strict=True)
        ]
    rows = compare_values(observed.values, expected, single, double, dtype)
    places = {
        row.name: place
        for row in rows
        for place in _beyond(observed.values[row.name], expected[row.name], sequences, row, limit)
    }
    return EngineComparison(
        rows=rows,
        places=places,
        prompt_lengths=[len(prompt) for prompt in prompts],
        num_tokens=sum(len(prompt) + len(completion) for prompt, completion in pairs),
    )


def _observe(engine: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> _Observed:
    """Complete prompts one at a time, in one way for each: what was drawn, and every point."""
    sampling = SamplingParams.unrestricted(num_tokens)
    kept: list[dict[str, Tensor]] = []
    completions: list[tuple[int, ...]] = []
    for index, prompt in enumerate(prompts):
        key = noise_key(0, "compare", 0, index, 0)
        request = RolloutRequest(request_id=0, prompt_token_ids=tuple(prompt), noise_key=key)
        recorder = Recorder()
        with engine.observed(recorder):
            (finished,) = generate(engine, [request], sampling)
        drawn = finished.completion
        completions.append(drawn.token_ids)
        logprobs = torch.tensor(drawn.logprobs)[:, None]
        values = recorder.values() | {LOGPROBS: logprobs}
        for point in (FINAL_NORM, LOGITS):  # a prompt that came in parts has some in between
            values[point] = values[point][-num_tokens:]
        kept.append(values)
    return _Observed(completions, {point: [them[point] for them in kept] for point in kept[0]})


def _policy_logprobs(
    policy: MegatronModel, prompt: Sequence[int], completion: Sequence[int]
) -> Tensor:
    """Of a completion's tokens by the path of training, [tokens, 1]."""
    batching = policy.micro_batching(MicroBatchConfig(micro_batch_size=1))
    batches = make_micro_batches([(prompt, completion)], batching)
    (logprobs,) = policy.logprobs(batches, 1.0)
    assert logprobs is not None  # of the last stage, which is the only one
    return logprobs.cpu()[batches[0].loss_mask][:, None]


def _logprobs_of(logits: Tensor, completion: Sequence[int]) -> Tensor:
    """Of a completion's tokens, from the logits of prompt and completion, [tokens, 1]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs = logits[-len(completion) :].to(dtype).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])


def _beyond(
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    sequences: Sequence[Sequence[int]],
    row: Comparison,
    limit: float | None,
) -> Iterator[tuple[int, int]]:
    """The first (prompt, token) of a row with a difference that is not allowed, if there is one."""
    allowed = row.allowed() if limit is None else limit
    for prompt, (x, y) in enumerate(zip(found, expected, strict=True)):
        # Written so that a value that is no number does not pass.
        good = relative_gap(x, y[-len(x) :]).amax(1) <= allowed
        if not good.all():
            yield prompt, len(sequences[prompt]) - len(x) + int((~good).nonzero()[0])
            return


# ---- the tool ------------------------------------------------------------------------------------


def add_compare(command: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of the tool."""
    command.add_argument(
        "folder",
        metavar="MODEL_FOLDER",
        help="model folder of either format; a run's checkpoint is one: "
        "RUN_DIR/checkpoints/step_00000010",
    )
    command.add_argument(
        "--engine", required=True, help="native, vllm, or another that lets itself be watched"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="number format of both; float32 shows the most (%(default)s)",
    )
    command.add_argument(
        "--prompts", metavar="FILE", help="texts, one a line; random tokens without"
    )
    command.add_argument(
        "--num-prompts", type=positive, default=2, help="random ones (%(default)s)"
    )
    command.add_argument(
        "--length", type=positive, default=64, help="tokens of a random prompt (%(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="of random prompts (%(default)s)")
    command.add_argument(
        "--num-tokens", type=positive, default=16, help="of each completion (%(default)s)"
    )
    command.add_argument(
        "--limit",
        type=float,
        metavar="X",
        help="differences may be X * max(1, |value|) (4 times the row's rounding, but "
        + ", ".join(f"{value:g} in {str(dtype).split('.')[1]}" for dtype, value in LIMITS.items())
        + " at least)",
    )


def run_compare(options: argparse.Namespace) -> int:
    """Compare and print; returns the exit code."""
    import gdpo_megatron.rollout.engines  # noqa: F401  # registers them

    folder, dtype = Path(options.folder), DTYPES[options.dtype]
    if options.limit is not None and not options.limit > 0:
        raise InputError(f"--limit is {options.limit}; needs to be above 0")
    factory = engines.get(options.engine)
    arch, checkpoint = open_model(folder)
    if options.num_tokens >= arch.max_position_embeddings:
        raise InputError(
            f"--num-tokens is {options.num_tokens}; the model has {arch.max_position_embeddings} "
            "positions, for prompt and completion"
        )
    texts = _lines(Path(options.prompts)) if options.prompts is not None else []
    prompts = read_prompts(
        folder,
        arch,
        texts,
        num_prompts=options.num_prompts,
        length=min(options.length, arch.max_position_embeddings - options.num_tokens),
        seed=options.seed,
        room=options.num_tokens,
    )
    length = max(map(len, prompts)) + options.num_tokens
    platform = detect_platform()
    warnings.filterwarnings("ignore", module=r"megatron\.core")  # that it runs without TE
    # What torchrun tells its ranks, and vLLM asks for.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    join_alone(platform)
    engine: Any = factory(engine_setup(folder, arch, platform, dtype, length))
    if not isinstance(engine, ObservableEngine):
        raise InputError(
            f"--engine {options.engine}: cannot be watched; it needs the method `observed` of "
            "rollout/observe.py"
        )
    policy = megatron_model(platform, checkpoint, arch, length, dtype)
    found = compare_engine(
        policy,
        engine,
        folder,
        checkpoint,
        prompts,
        num_tokens=options.num_tokens,
        limit=options.limit,
    )
    print(*report_lines(found, options.engine, options.dtype, options.limit), sep="\n")
    return 0 if found.first is None else 1


def engine_setup(
    folder: Path, arch: ModelArchitecture, platform: Platform, dtype: torch.dtype, length: int
) -> EngineSetup:
    """Of an engine on this rank alone, for one sequence at a time."""
    from gdpo_megatron.distributed.mesh import EngineMesh

    tokens = -(-length // _BLOCK) * _BLOCK + 2 * _BLOCK
    values = 2 * arch.num_layers * arch.num_key_value_heads * arch.head_dim * tokens
    return EngineSetup(
        arch=arch,
        tokenizer=load_tokenizer(model_files(folder)),
        model_files=model_files(folder),
        mesh=EngineMesh(replica=0, num_replicas=1, tp_rank=0, tp_size=1, tp_group=None),
        platform=platform,
        dtype=dtype,
        max_sequence_length=length,
        max_concurrent_sequences=1,
        seed=0,
        # What is compiled cannot be watched.
        vllm=VllmConfig(kv_cache_gib=values * dtype.itemsize / 2**30 + 0.125, enforce_eager=True),
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"--prompts: no file {path}")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {path}: is not UTF-8: {error}") from error
    if not lines:
        raise InputError(f"--prompts {path}: has no line with text")
    return lines


def report_lines(
    found: EngineComparison, engine: str, dtype: str, limit: float | None
) -> Iterator[str]:
    """Table and verdict as text."""
    prompts = len(found.prompt_lengths)
    yield (
        f"{engine} and Megatron in {dtype}, {found.num_tokens:,} tokens of {prompts} prompts and "
        "their completions, largest"
    )
    yield (
        "over all of them; relative to max(1, |value|); rounding is transformers against its "
        "float64:"
    )
    first = found.first

    def mark(row: Comparison) -> str:
        if row is first:
            return "<- first beyond its limit"
        return "beyond" if row.name in found.places else ""

    yield from table_lines(found.rows, mark)
    if first is None:
        yield (
            "no difference beyond rounding: on one rank, right after a sync, the engine computes "
            "what the trainer does"
        )
        return
    allowed = first.allowed() if limit is None else limit
    prompt, token = found.places[first.name]
    length = found.prompt_lengths[prompt]
    where = f"prompt token {token}" if token < length else f"completion token {token - length}"
    yield (
        f"first difference: {first.name}, {first.relative:.2e} where {allowed:.2e} is allowed; "
        f"prompt {prompt}, from {where} on"
    )
