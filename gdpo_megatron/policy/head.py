"""The last stage's end: log-probs of labels where Megatron's GPTModel would return logits.

GPTModel asks its output layer for the logits of all tokens, [s, b, V / tp], and then copies them
into another order; in bfloat16 its wrapper adds a float32 copy. With labels at hand the layer
answers with one number per token instead, so that none of these copies is made, and the entropy
waits beside it. In chunks, the logits themselves exist for a few tokens at a time only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from gdpo_megatron.policy.logprobs import chunked_logprobs_and_entropy, logprobs_and_entropy


@dataclass(slots=True)
class LabelRequest:
    """What one forward pass is asked for.

    Args:
        labels: [b, s] int64, of the tokens that this context-parallel rank has.
        temperature: divides the logits.
        entropy: [b, s] float32, in nats; there after the pass.
    """

    labels: Tensor
    temperature: float
    entropy: Tensor | None = None


class LabelHead:
    """Takes the place of a GPTModel's output layer's forward.

    Args:
        gpt: the chunk that has the output layer.
        vocab_size: without padding.
        chunk_tokens: tokens whose logits exist at a time; None means all, which are then kept for
            the backward pass instead of being computed a second time.
        group: the TP group.
    """

    def __init__(
        self, gpt: GPTModel, *, vocab_size: int, chunk_tokens: int | None, group: ProcessGroup
    ):
        self._layer: Any = gpt.output_layer
        self._logits = self._layer.forward
        self._vocab_size, self._chunk_tokens, self._group = vocab_size, chunk_tokens, group
        self._request: LabelRequest | None = None
        self._layer.forward = self._forward

    @contextmanager
    def answers(self, request: LabelRequest) -> Iterator[None]:
        """Within, the model returns log-probs float32 [b, s] of the labels instead of logits."""
        self._request = request
        try:
            yield
        finally:
            self._request = None

    def _forward(
        self, hidden: Tensor, weight: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        """As ColumnParallelLinear: hidden [s, b, h], with sequence parallelism [s / tp, b, h]."""
        request = self._request
        if request is None:
            return self._logits(hidden, weight=weight, **options)
        targets = request.labels.transpose(0, 1)
        softmax: dict[str, Any] = {
            "temperature": request.temperature,
            "vocab_size": self._vocab_size,
            "group": self._group,
        }
        if self._chunk_tokens is None:
            logits, _ = self._logits(hidden, weight=weight, **options)
            logprobs, entropy = logprobs_and_entropy(logits, targets, **softmax)
        else:
            if self._layer.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=self._group)
            else:
                hidden = copy_to_tensor_model_parallel_region(hidden, group=self._group)
            values = chunked_logprobs_and_entropy(
                hidden.flatten(0, 1),
                self._layer.weight if weight is None else weight,
                targets.flatten(),
                chunk_tokens=self._chunk_tokens,
                **softmax,
            )
            logprobs, entropy = (x.view(targets.shape) for x in values)
        request.entropy = entropy.transpose(0, 1)
        return logprobs, None
