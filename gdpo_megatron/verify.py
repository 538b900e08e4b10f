"""Is a model folder what it says: its files, its tensors, and what Megatron computes with them.

The logits of the Megatron model are compared with those of transformers in float32, and so are the
hidden states after each layer: the first layer that differs is where to look. How far apart two
correct models may be in float32 depends on the weights: transformers is therefore also compared
with itself in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.config.schema import ParallelConfig, PrecisionConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.checks import dtype_name, num_non_finite
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
from gdpo_megatron.platform import Platform, detect_platform

LIMIT = 2e-6
"""Difference of a logit, relative to max(1, |logit|), that is always allowed in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far two tensors are apart, over all prompts.

    Args:
        name: of what was compared.
        largest: largest value of transformers' tensor.
        difference: largest difference.
        relative: largest difference relative to max(1, |value|).
        rounding: the same between transformers' float32 and its float64.
    """

    name: str
    largest: float
    difference: float
    relative: float
    rounding: float


def open_model(folder: Path) -> tuple[ModelArchitecture, Checkpoint]:
    """Architecture and weights of a model folder, audited against its config.

    Raises:
        InputError: it is no model, or its weights are not those of its config.
    """
    arch = load_architecture(model_files(folder))
    return arch, open_checkpoint(folder, arch)


def different_tensors(one: Checkpoint, other: Checkpoint, arch: ModelArchitecture) -> list[str]:
    """One line for each tensor that is not the same, bit for bit."""
    lines: list[str] = []
    for name in hf_shapes(arch):
        x, y = one.get(name), other.get(name)
        if x.dtype != y.dtype:
            lines.append(f"{name}: {dtype_name(x.dtype)} and {dtype_name(y.dtype)}")
        elif not torch.equal(_bits(x), _bits(y)):
            differs = _bits(x) != _bits(y)
            largest = float((x.double() - y.double()).abs().max())
            lines.append(
                f"{name}: {int(differs.sum()):,} of {x.numel():,} values differ, by {largest:.3g}"
            )
    return lines


def _bits(tensor: Tensor) -> Tensor:
    """The values as integers: NaN equals itself, and 0.0 is not -0.0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def non_finite_tensors(checkpoint: Checkpoint, arch: ModelArchitecture) -> dict[str, int]:
    """Tensor -> how many of its values are NaN or infinite."""
    counts = {name: num_non_finite(checkpoint.get(name)) for name in hf_shapes(arch)}
    return {name: count for name, count in counts.items() if count}


def read_prompts(
    folder: Path,
    arch: ModelArchitecture,
    texts: Sequence[str],
    *,
    num_prompts: int,
    length: int,
    seed: int,
) -> list[list[int]]:
    """Token ids to compare on: of texts, or random ones where none are given.

    Args:
        folder: the model; its tokenizer encodes the texts.
        arch: its shape.
        texts: prompts.
        num_prompts: random prompts.
        length: tokens of a random prompt.
        seed: of the random prompts.

    Raises:
        InputError: a prompt is empty or longer than the model's positions.
    """
    if texts:
        tokenizer = load_tokenizer(model_files(folder))
        prompts = [tokenizer.encode(text) for text in texts]
    else:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_prompts, length)
        prompts = torch.randint(0, arch.vocab_size, shape, generator=generator).tolist()
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) <= arch.max_position_embeddings:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; the model takes 1 to "
                f"{arch.max_position_embeddings}"
            )
    return prompts


def allowed(logits: Comparison, factor: float) -> float:
    """How far logits may be apart, relative to max(1, |logit|).

    Both models round, each in its own way: four times what transformers alone is off by, where that
    is more than LIMIT. A wrong tensor is off by orders of magnitude more.
    """
    return factor * max(LIMIT, 4 * logits.rounding)


@torch.no_grad()
def compare_with_transformers(
    folder: Path,
    checkpoint: Checkpoint,
    arch: ModelArchitecture,
    prompts: Sequence[Sequence[int]],
    *,
    reference: Path | None = None,
) -> list[Comparison]:
    """Run both models in float32 and compare what every layer gives; logits come last.

    One model at a time is in memory, in float64 with 8 bytes for each parameter.

    Args:
        folder: the model.
        checkpoint: its weights, which the Megatron model is loaded from.
        arch: its shape.
        prompts: token ids.
        reference: Hugging Face folder that transformers reads; None means `folder`, and where that
            is a Megatron checkpoint, transformers is given the tensors.
    """
    platform = detect_platform()
    platform.prepare_megatron()  # before anything imports Megatron
    theirs = _transformers_model(folder, checkpoint, arch, reference).to(platform.device)
    single = _record_prompts(theirs, _transformers_modules(theirs), prompts)
    theirs = theirs.double()
    double = _record_prompts(theirs, _transformers_modules(theirs), prompts)
    del theirs
    ours = _megatron_model(platform, checkpoint, arch, max(map(len, prompts)))
    found = _record_prompts(_Forward(ours), _megatron_modules(ours.gpt), prompts)
    rows: list[Comparison] = []
    for name, expected in single.items():
        # Megatron's hidden states are [s, b, h], with b = 1.
        values = [x.reshape(y.shape) for x, y in zip(found[name], expected, strict=True)]
        rows.append(
            Comparison(
                name=name,
                largest=max(float(x.abs().max()) for x in expected),
                difference=_largest(values, expected, relative=False),
                relative=_largest(values, expected, relative=True),
                rounding=_largest(expected, double[name], relative=True),
            )
        )
    return rows


def _largest(found: Sequence[Tensor], expected: Sequence[Tensor], *, relative: bool) -> float:
    """Largest difference over all prompts; NaN where there is one."""
    gaps: list[Tensor] = []
    for x, y in zip(found, expected, strict=True):
        gap = (x.double() - y.double()).abs()
        gaps.append((gap / y.double().abs().clamp(min=1) if relative else gap).max())
    return float(torch.stack(gaps).max())


def _transformers_model(
    folder: Path, checkpoint: Checkpoint, arch: ModelArchitecture, reference: Path | None
) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference = reference or folder
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
        "local_files_only": True,
        "trust_remote_code": False,
    }
    if is_megatron(reference):
        config = AutoConfig.from_pretrained(
            model_files(reference), local_files_only=True, trust_remote_code=False
        )
        # The class itself: the automatic one wants a folder.
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        tensors = {name: checkpoint.get(name) for name in hf_shapes(arch)}
        return model_class.from_pretrained(
            None, config=config, state_dict=tensors, **options
        ).eval()
    return AutoModelForCausalLM.from_pretrained(reference, **options).eval()


def _megatron_model(
    platform: Platform, checkpoint: Checkpoint, arch: ModelArchitecture, length: int
) -> Any:
    from gdpo_megatron.distributed import mesh as meshes
    from gdpo_megatron.policy.model import MegatronModel

    parallel = ParallelConfig()
    if not dist.is_initialized():
        platform.setup(0)
        # One rank has nobody to meet at an address.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(platform.backend, store=store, rank=0, world_size=1)
    model = MegatronModel(
        arch,
        parallel=parallel,
        precision=PrecisionConfig(params_dtype="float32"),
        max_sequence_length=length,
        mesh=meshes.initialize(parallel, platform),
        platform=platform,
    )
    model.load_hf(checkpoint)
    model.gpt.eval()
    return model


def _transformers_modules(model: Any) -> dict[str, torch.nn.Module]:
    decoder = model.get_decoder()
    layers = {f"layer {i}": layer for i, layer in enumerate(decoder.layers)}
    return {"embedding": decoder.embed_tokens, **layers, "final norm": decoder.norm}


def _megatron_modules(gpt: Any) -> dict[str, torch.nn.Module]:
    layers = {f"layer {i}": layer for i, layer in enumerate(gpt.decoder.layers)}
    return {"embedding": gpt.embedding, **layers, "final norm": gpt.decoder.final_layernorm}


class _Forward:
    """A Megatron model, called with token ids alone as transformers' are."""

    def __init__(self, model: Any):
        self._model = model

    def __call__(self, tokens: Tensor) -> Any:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        logits = self._model.gpt(tokens, positions, None)
        return SimpleNamespace(logits=logits[..., : self._model.arch.vocab_size])


def _record_prompts(
    model: Callable[[Tensor], Any],
    modules: dict[str, torch.nn.Module],
    prompts: Sequence[Sequence[int]],
) -> dict[str, list[Tensor]]:
    """What modules give for each prompt, and the logits."""
    values: dict[str, list[Tensor]] = {name: [] for name in (*modules, "logits")}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            kept = output[0] if isinstance(output, tuple) else output
            values[name].append(kept.detach().clone())

        return hook

    device = next(next(iter(modules.values())).parameters()).device
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        for prompt in prompts:
            logits = model(torch.tensor([list(prompt)], device=device)).logits
            values["logits"].append(logits.detach())
    finally:
        for handle in handles:
            handle.remove()
    return values
