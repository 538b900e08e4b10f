"""Text from a model folder: the native engine alone, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import stop_token_ids
from gdpo_megatron.conversion.hf_writer import hf_tensors
from gdpo_megatron.conversion.model_folder import model_files, open_checkpoint
from gdpo_megatron.data.tokenizer import load_tokenizer
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.errors import InputError
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.rollout.base import RolloutRequest, SamplingParams, generate, noise_key
from gdpo_megatron.rollout.native import NativeEngine


def generate_texts(
    folder: Path,
    prompts: Sequence[str],
    sampling: SamplingParams,
    seed: int,
    tokenizer_path: str | None = None,
    *,
    with_prompt: bool = False,
) -> list[str]:
    """Complete prompts.

    Args:
        folder: model folder, of either format, or a checkpoint of a run.
        prompts: texts to go on from.
        sampling: how; its stop_token_ids are replaced by the model's.
        seed: of the sampling noise.
        tokenizer_path: tokenizer folder or .model file; None means the model's.
        with_prompt: give prompt and completion as one text: decoded alone, a completion of a
            SentencePiece model has lost the space that it begins with.

    Returns:
        The completions, in order.

    Raises:
        InputError: no such model, or a prompt too long for it.
    """
    platform = detect_platform()
    platform.setup(0)
    files = model_files(folder)
    arch = load_architecture(files)
    checkpoint = open_checkpoint(folder, arch)
    tokenizer = load_tokenizer(tokenizer_path or files)
    requests = [
        RolloutRequest(
            request_id=i,
            prompt_token_ids=tuple(tokenizer.encode(prompt)),
            noise_key=noise_key(seed, "generate", 0, i, 0),
        )
        for i, prompt in enumerate(prompts)
    ]
    for request in requests:
        length = len(request.prompt_token_ids)
        if not 0 < length < arch.max_position_embeddings:
            raise InputError(
                f"prompt {request.request_id + 1} has {length} tokens; the model takes 1 to "
                f"{arch.max_position_embeddings - 1}"
            )
    longest = max(len(r.prompt_token_ids) for r in requests) + sampling.max_completion_tokens
    engine = NativeEngine(
        arch,
        tokenizer,
        mesh=EngineMesh(replica=0, num_replicas=1, tp_rank=0, tp_size=1, tp_group=None),
        platform=platform,
        dtype=torch.float32,
        max_sequence_length=min(arch.max_position_embeddings, longest),
        max_concurrent_sequences=len(requests),
    )
    engine.load_weights(hf_tensors(checkpoint, arch), 0)
    sampling = replace(sampling, stop_token_ids=stop_token_ids(files, tokenizer.eos_token_id))
    done = generate(engine, requests, sampling)
    if not with_prompt:
        return [finished.completion.text for finished in done]
    return [
        tokenizer.decode([*request.prompt_token_ids, *finished.completion.token_ids])
        for request, finished in zip(requests, done, strict=True)
    ]
