"""The model's forward pass over a KV cache, written out: prefill of prompts, then single tokens.

Row i of the cache belongs to row i of the batch. A row's cache holds its first `lengths[i]`
positions; what lies beyond is finite and gets no weight. One key/value head serves n/g query heads:
for a single new token these are laid out as the "sequence" of the attention call, so nothing is
repeated.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from gdpo_megatron.rollout.native.linear import linear
from gdpo_megatron.rollout.native.weights import LayerWeights, NativeWeights
from gdpo_megatron.rollout.observe import (
    EMBEDDING,
    FINAL_NORM,
    LOGITS,
    OnValue,
    after_attention,
    after_mlp,
)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split form; x [..., d], cos and sin broadcast to it.

    The first half of `sin` is negative, in place of the second half of x that it multiplies.
    """
    first, second = x.chunk(2, -1)
    return (x * cos).add_(torch.cat((second, first), -1).mul_(sin))


def _gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = linear(x, gate_up).chunk(2, -1)
    return linear(F.silu(gate).mul_(up), down)


class Decoder:
    """Forward passes of one TP rank.

    Args:
        weights: this rank's weights.
        max_length: longest sequence, in tokens.
        group: the engine's TP group; None for one rank.
    """

    def __init__(self, weights: NativeWeights, max_length: int, group: ProcessGroup | None):
        self.weights, self._group = weights, group
        arch, device = weights.arch, weights.embedding.device
        angles = torch.outer(
            torch.arange(max_length, dtype=torch.float32), arch.inverse_frequencies()
        ).repeat(1, 2)
        dtype = weights.embedding.dtype
        self._cos = angles.cos().to(device, dtype)
        first, second = angles.sin().chunk(2, -1)
        self._sin = torch.cat((-first, second), -1).to(device, dtype)  # see _rotate
        self._cache: Tensor | None = None
        self.on_value: OnValue | None = None
        """Told what every point of a pass has, where somebody watches."""

    # ---- cache -------------------------------------------------------------------------------

    @property
    def cache(self) -> Tensor:
        """[L, 2, rows, g, length, d]: keys and values of every layer."""
        assert self._cache is not None, "reserve() comes first"
        return self._cache

    def reserve(self, rows: int, length: int, *, keep_rows: int) -> None:
        """Make the cache at least this large; its first `keep_rows` rows keep what they hold."""
        arch, weights, old = self.weights.arch, self.weights, self._cache
        if old is not None:
            if old.shape[2] >= rows and old.shape[4] >= length:
                return
            rows, length = max(rows, old.shape[2]), max(length, old.shape[4])
        # Zeros: attention gives unused positions weight 0, and 0 times a stray NaN is NaN.
        self._cache = torch.zeros(
            (arch.num_layers, 2, rows, weights.num_groups, length, arch.head_dim),
            dtype=weights.embedding.dtype,
            device=weights.embedding.device,
        )
        if old is not None:
            self._cache[:, :, :keep_rows, :, : old.shape[4]] = old[:, :, :keep_rows]

    def drop_cache(self) -> None:
        """Free the cache; weights that were not finite may have left NaN anywhere in it."""
        self._cache = None

    def move_rows(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows of the cache onto others."""
        if sources:
            self.cache[:, :, targets] = self.cache[:, :, sources]

    # ---- forward -----------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        """Run prompts and fill the cache with them.

        Args:
            tokens: int64 [p, s], prompts padded on the right.
            lengths: int64 [p], their lengths.
            prompts: int64 [m], which prompt each new row starts from.
            rows: int64 [m], the cache rows to fill.

        Returns:
            Logits after each prompt, float32 [p, V].
        """
        w, d = self.weights, self.weights.arch.head_dim
        p, s = tokens.shape
        cos, sin = self._cos[:s, None], self._sin[:s, None]
        x = self._embed(tokens)
        for index, layer in enumerate(w.layers):
            qk, v = self._project(layer, x)
            qk = _rotate(qk, cos, sin).transpose(1, 2)
            q, k = qk.split([w.num_heads, w.num_groups], 1)
            v = v.view(p, s, -1, d).transpose(1, 2)
            self.cache[index, 0, rows, :, :s] = k[prompts]
            self.cache[index, 1, rows, :, :s] = v[prompts]
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=w.num_heads != w.num_groups
            )
            x = self._finish_layer(index, x, attended.transpose(1, 2).reshape(p, s, -1))
        last = x[torch.arange(p, device=x.device), lengths - 1]
        return self._logits(last)

    @torch.no_grad()
    def decode(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """Append one token to each of the first n rows.

        Args:
            tokens: int64 [n].
            lengths: int64 [n], tokens that a row's cache holds already.
            longest: largest of `lengths`, known to the caller without asking the device.

        Returns:
            Logits, float32 [n, V].
        """
        w, d = self.weights, self.weights.arch.head_dim
        n, span = tokens.shape[0], longest + 1
        cos, sin = self._cos[lengths].unsqueeze(1), self._sin[lengths].unsqueeze(1)
        batch = torch.arange(n, device=tokens.device)
        visible = torch.arange(span, device=tokens.device) <= lengths.unsqueeze(1)
        # As numbers: from booleans, attention would make them anew in every layer.
        mask = torch.zeros(n, span, dtype=w.embedding.dtype, device=tokens.device)
        mask = mask.masked_fill_(~visible, float("-inf"))[:, None, None, :]
        x = self._embed(tokens)
        for index, layer in enumerate(w.layers):
            qk, v = self._project(layer, x)
            qk = _rotate(qk, cos, sin)
            q, k = qk.split([w.num_heads, w.num_groups], 1)
            keys, values = self.cache[index]
            keys[batch, :, lengths] = k
            values[batch, :, lengths] = v.view(n, -1, d)
            attended = F.scaled_dot_product_attention(
                q.reshape(n, w.num_groups, -1, d),
                keys[:n, :, :span],
                values[:n, :, :span],
                attn_mask=mask,
            )
            x = self._finish_layer(index, x, attended.reshape(n, -1))
        return self._logits(x)

    def _project(self, layer: LayerWeights, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys together, [..., n + g, d], and values, from a layer's input."""
        w, d = self.weights, self.weights.arch.head_dim
        normed = F.rms_norm(x, x.shape[-1:], layer.input_norm, w.arch.rms_norm_eps)
        qk, v = linear(normed, layer.qkv, layer.qkv_bias).split(
            [(w.num_heads + w.num_groups) * d, w.num_groups * d], -1
        )
        qk = qk.unflatten(-1, (-1, d))
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (d,), eps=w.arch.rms_norm_eps) * layer.qk_norm
        return qk, v

    def _finish_layer(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residual, gated MLP or experts, residual."""
        layer = self.weights.layers[index]
        x = x + self._all_reduce(linear(attended, layer.o))
        self._report(after_attention(index), x)
        normed = F.rms_norm(x, x.shape[-1:], layer.post_norm, self.weights.arch.rms_norm_eps)
        if layer.router is not None:
            added = self._experts(layer, layer.router, normed)
        else:
            added = _gated_mlp(normed, layer.gate_up, layer.down)
        x = x + self._all_reduce(added)
        self._report(after_mlp(index), x)
        return x

    def _experts(self, layer: LayerWeights, router: Tensor, x: Tensor) -> Tensor:
        """This rank's part of the weighted sum of each token's chosen experts."""
        moe = self.weights.arch.moe
        assert moe is not None
        tokens = x.flatten(0, -2)
        probabilities = linear(tokens, router).float().softmax(-1)
        weights, chosen = probabilities.topk(moe.top_k, -1)
        if moe.normalize_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            done = _gated_mlp(tokens[rows], layer.gate_up[expert], layer.down[expert])
            out.index_add_(0, rows, done * weights[rows, slots, None])
        return out.view_as(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        w = self.weights
        if self._group is None:
            found = F.embedding(tokens, w.embedding)
        else:
            local = tokens - w.vocab_start
            elsewhere = (local < 0) | (local >= w.vocab_rows)
            found = F.embedding(local.masked_fill(elsewhere, 0), w.embedding)
            self._all_reduce(found.masked_fill_(elsewhere.unsqueeze(-1), 0.0))
        self._report(EMBEDDING, found)
        return found

    def _logits(self, x: Tensor) -> Tensor:
        w = self.weights
        normed = F.rms_norm(x, x.shape[-1:], w.final_norm, w.arch.rms_norm_eps)
        self._report(FINAL_NORM, normed)
        logits = linear(normed, w.output).float()
        if self._group is not None:
            parts = [torch.empty_like(logits) for _ in range(self._group.size())]
            dist.all_gather(parts, logits, group=self._group)
            logits = torch.cat(parts, -1)
        logits = logits[..., : w.arch.vocab_size]
        self._report(LOGITS, logits)
        return logits

    def _report(self, point: str, value: Tensor) -> None:
        if self.on_value is not None:
            self.on_value(point, value)

    def _all_reduce(self, x: Tensor) -> Tensor:
        if self._group is not None:
            dist.all_reduce(x, group=self._group)
        return x
