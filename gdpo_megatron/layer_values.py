"""What two implementations of one model compute, layer by layer, and how far apart they are.

The implementations are the Megatron model, transformers' and a rollout engine. How far apart two
correct ones may be depends on the weights and the number format: transformers' is therefore also
compared with itself in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.config.schema import ParallelConfig, PrecisionConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.conversion.model_folder import (
    Checkpoint,
    is_megatron,
    model_files,
    open_checkpoint,
)
from gdpo_megatron.data.tokenizer import load_tokenizer
from gdpo_megatron.errors import InputError
from gdpo_megatron.platform import Platform
from gdpo_megatron.rollout.observe import (
    EMBEDDING,
    FINAL_NORM,
    LOGITS,
    Take,
    after_attention,
    after_mlp,
    given,
    hooked,
    returned,
)

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 0.03}
"""Difference relative to max(1, |value|) that is always allowed, by number format."""

PointValues = dict[str, list[Tensor]]
"""Point -> for each sequence of tokens what is there, [tokens, h]; logits [tokens, V]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far two tensors are apart, over all prompts.

    Args:
        name: of what was compared.
        largest: largest value of the reference.
        difference: largest difference.
        relative: largest difference relative to max(1, |value|).
        rounding: the same between transformers and its float64.
        dtype: the number format that both were computed in.
    """

    name: str
    largest: float
    difference: float
    relative: float
    rounding: float
    dtype: torch.dtype = torch.float32

    def allowed(self, factor: float = 1.0) -> float:
        """How large `relative` may be.

        Both sides round, each in its own way: four times what transformers alone is off by, where
        that is more than the entry of LIMITS. What is wrong is usually off by orders of magnitude
        more.
        """
        return factor * max(LIMITS[self.dtype], 4 * self.rounding)


def compare_values(
    found: Mapping[str, Sequence[Tensor]],
    expected: Mapping[str, Sequence[Tensor]],
    single: Mapping[str, Sequence[Tensor]],
    double: Mapping[str, Sequence[Tensor]],
    dtype: torch.dtype = torch.float32,
) -> list[Comparison]:
    """A row for each point of `found`.

    Args:
        found: what is tested; for each sequence of tokens its last ones may do.
        expected: what it is compared with.
        single: transformers' values in `dtype`.
        double: the same in float64.
        dtype: of found and expected.
    """
    rows: list[Comparison] = []
    for name, values in found.items():
        reference, rounded, exact = (
            [x[-len(y) :] for x, y in zip(them[name], values, strict=True)]
            for them in (expected, single, double)
        )
        rows.append(
            Comparison(
                name=name,
                largest=max(float(x.abs().max()) for x in reference),
                difference=_largest(values, reference, relative=False),
                relative=_largest(values, reference, relative=True),
                rounding=_largest(rounded, exact, relative=True),
                dtype=dtype,
            )
        )
    return rows


def relative_gap(x: Tensor, y: Tensor) -> Tensor:
    """|x - y| / max(1, |y|), float64."""
    return (x.double() - y.double()).abs() / y.double().abs().clamp(min=1)


def _largest(found: Sequence[Tensor], expected: Sequence[Tensor], *, relative: bool) -> float:
    """Largest difference over all prompts; NaN where there is one."""
    gaps = [
        (relative_gap(x, y) if relative else (x.double() - y.double()).abs()).max()
        for x, y in zip(found, expected, strict=True)
    ]
    return float(torch.stack(gaps).max())


def table_lines(
    rows: Sequence[Comparison], mark: Callable[[Comparison], str] = lambda _: ""
) -> Iterator[str]:
    """The rows as text, under a head; `mark` says what stands behind one."""
    width = max(len(row.name) for row in rows)
    yield f"  {'':{width}}     |value|  difference    relative    rounding"
    for row in rows:
        errors = (row.difference, row.relative, row.rounding)
        numbers = "  ".join(f"{value:10.2e}" for value in errors)
        yield f"  {row.name:{width}}  {row.largest:10.4g}  {numbers}  {mark(row)}".rstrip()


# ---- models and prompts --------------------------------------------------------------------------


def open_model(folder: Path) -> tuple[ModelArchitecture, Checkpoint]:
    """Architecture and weights of a model folder, audited against its config.

    Raises:
        InputError: it is no model, or its weights are not those of its config.
    """
    arch = load_architecture(model_files(folder))
    return arch, open_checkpoint(folder, arch)


def read_prompts(
    folder: Path,
    arch: ModelArchitecture,
    texts: Sequence[str],
    *,
    num_prompts: int,
    length: int,
    seed: int,
    room: int = 0,
) -> list[list[int]]:
    """Token ids to compare on: of texts, or random ones where none are given.

    Args:
        folder: the model; its tokenizer encodes the texts.
        arch: its shape.
        texts: prompts.
        num_prompts: random prompts.
        length: tokens of a random prompt.
        seed: of the random prompts.
        room: positions that are needed after a prompt.

    Raises:
        InputError: a prompt is empty or longer than the model's positions leave.
    """
    if texts:
        tokenizer = load_tokenizer(model_files(folder))
        prompts = [tokenizer.encode(text) for text in texts]
    else:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_prompts, length)
        prompts = torch.randint(0, arch.vocab_size, shape, generator=generator).tolist()
    most = arch.max_position_embeddings - room
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) <= most:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; the model takes 1 to {most}"
                + (f" and {room} after them" if room else "")
            )
    return prompts


def join_alone(platform: Platform) -> None:
    """Be the one rank of a process group, before anything imports Megatron."""
    platform.prepare_megatron()
    if not dist.is_initialized():
        platform.setup(0)
        # One rank has nobody to meet at an address.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(platform.backend, store=store, rank=0, world_size=1)


def megatron_model(
    platform: Platform,
    checkpoint: Checkpoint,
    arch: ModelArchitecture,
    length: int,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The Megatron model on one rank, for sequences up to a length; see `join_alone`."""
    from gdpo_megatron.distributed import mesh as meshes
    from gdpo_megatron.policy.model import MegatronModel

    parallel = ParallelConfig()
    precision: Any = "bfloat16" if dtype == torch.bfloat16 else "float32"
    model = MegatronModel(
        arch,
        parallel=parallel,
        precision=PrecisionConfig(params_dtype=precision),
        max_sequence_length=length,
        mesh=meshes.initialize(parallel, platform),
        platform=platform,
    )
    model.load_hf(checkpoint)
    model.gpt.eval()
    return model


def transformers_model(
    folder: Path,
    checkpoint: Checkpoint,
    arch: ModelArchitecture,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Transformers' model with its plainest attention; a Megatron checkpoint gives the tensors."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
        "local_files_only": True,
        "trust_remote_code": False,
    }
    if is_megatron(folder):
        config = AutoConfig.from_pretrained(
            model_files(folder), local_files_only=True, trust_remote_code=False
        )
        # The class itself: the automatic one wants a folder.
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        tensors = {name: checkpoint.get(name) for name in hf_shapes(arch)}
        return model_class.from_pretrained(
            None, config=config, state_dict=tensors, **options
        ).eval()
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


# ---- recording -----------------------------------------------------------------------------------


def record_megatron(model: Any, sequences: Sequence[Sequence[int]]) -> PointValues:
    """Every point of a whole Megatron model, for sequences of token ids."""
    gpt = model.gpt
    points: dict[str, tuple[torch.nn.Module, Take]] = {EMBEDDING: (gpt.embedding, returned)}
    for index, layer in enumerate(gpt.decoder.layers):
        points[after_attention(index)] = (layer.pre_mlp_layernorm, given)
        points[after_mlp(index)] = (layer, returned)
    points[FINAL_NORM] = (gpt.decoder.final_layernorm, returned)

    def forward(tokens: Tensor) -> Any:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        logits = gpt(tokens, positions, None)
        return SimpleNamespace(logits=logits[..., : model.arch.vocab_size])

    return _record(forward, points, sequences)


def record_transformers(model: Any, sequences: Sequence[Sequence[int]]) -> PointValues:
    """Every point of transformers' model, for sequences of token ids."""
    decoder = model.get_decoder()
    points: dict[str, tuple[torch.nn.Module, Take]] = {EMBEDDING: (decoder.embed_tokens, returned)}
    for index, layer in enumerate(decoder.layers):
        points[after_attention(index)] = (layer.post_attention_layernorm, given)
        points[after_mlp(index)] = (layer, returned)
    points[FINAL_NORM] = (decoder.norm, returned)
    return _record(model, points, sequences)


class Recorder:
    """Keeps what points of one sequence have, token after token."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def __call__(self, point: str, value: Tensor) -> None:
        """Take the next tokens' values."""
        # Megatron's are [s, b, h], others' [b, s, h] or [s, h]; b is 1.
        rows = value.detach().reshape(-1, value.shape[-1])
        self._parts.setdefault(point, []).append(rows.cpu().clone())

    def values(self) -> dict[str, Tensor]:
        """Point -> [tokens, ...], in the order in which points were first seen."""
        return {point: torch.cat(parts) for point, parts in self._parts.items()}


@torch.no_grad()
def _record(
    forward: Callable[[Tensor], Any],
    points: Mapping[str, tuple[torch.nn.Module, Take]],
    sequences: Sequence[Sequence[int]],
) -> PointValues:
    device = next(points[EMBEDDING][0].parameters()).device
    kept: list[dict[str, Tensor]] = []
    for tokens in sequences:
        recorder = Recorder()
        with hooked(points, recorder):
            recorder(LOGITS, forward(torch.tensor([list(tokens)], device=device)).logits)
        kept.append(recorder.values())
    return {point: [values[point] for values in kept] for point in kept[0]}
