"""Drawing tokens: Gumbel-max with noise that belongs to the token, not to the batch.

The noise of (completion, position, token id) is a hash of these three, in 32-bit integer
arithmetic that every device does alike. So the same completion draws the same noise on any rank,
in any batch, after any resume; two runs can differ only where the two best perturbed logits are
closer than their rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """A 32-bit pattern as the int32 that has it."""
    return word - (1 << 32) if word >= 1 << 31 else word


_ODD_1, _ODD_2 = _signed(0x7FEB352D), _signed(0x846CA68B)
_POSITION_1, _POSITION_2 = _signed(0x9E3779B1), _signed(0x85EBCA77)
_WORD_64 = (1 << 64) - 1


def _shift(x: Tensor, bits: int, out: Tensor) -> Tensor:
    """X >>> bits into `out`; int32 shifts are arithmetic, so the sign bits are masked off."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(x: Tensor, spare: Tensor) -> Tensor:
    """Avalanche of int32 in place (Wellons' lowbias32); `spare` is overwritten."""
    x.bitwise_xor_(_shift(x, 16, spare)).mul_(_ODD_1)
    x.bitwise_xor_(_shift(x, 15, spare)).mul_(_ODD_2)
    return x.bitwise_xor_(_shift(x, 16, spare))


def _mixed(x: Tensor) -> Tensor:
    return _mix(x, torch.empty_like(x))


def split_keys(keys: list[int], device: torch.device) -> Tensor:
    """64-bit noise keys as int32 [n, 2]; any keys will do, consecutive ones too."""
    mixed = [_mix_key(key) for key in keys]
    words = [[_signed(key >> 32), _signed(key & 0xFFFFFFFF)] for key in mixed]
    return torch.tensor(words, dtype=torch.int32, device=device).reshape(-1, 2)


def _mix_key(key: int) -> int:
    """Spread a key's bits over both words (splitmix64); different keys stay different."""
    key = (key + 0x9E3779B97F4A7C15) & _WORD_64
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _WORD_64
    key = (key ^ key >> 27) * 0x94D049BB133111EB & _WORD_64
    return key ^ key >> 31


class KeyedNoise:
    """Gumbel noise for a vocabulary.

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        device: where the noise is made.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        ids = torch.arange(1, vocab_size + 1, dtype=torch.int32, device=device)
        self._hashed_ids = _mixed(ids * _POSITION_1)

    def gumbel(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Standard Gumbel noise, float32 [n, V].

        Args:
            keys: int32 [n, 2], see `split_keys`.
            positions: int64 or int32 [n], index of the token within the completion.
        """
        positions = positions.to(torch.int32)
        first = _mixed((positions * _POSITION_1).bitwise_xor_(keys[:, 0])).unsqueeze(1)
        second = _mixed((positions * _POSITION_2).bitwise_xor_(keys[:, 1])).unsqueeze(1)
        # The first word permutes, the second multiplies: both act on every token's bits.
        # Two buffers do: for a large vocabulary, fresh memory costs more than the arithmetic.
        x = self._hashed_ids ^ first
        spare = torch.empty_like(x)
        _mix(x, spare).mul_(second | 1)
        x.bitwise_xor_(_shift(x, 16, spare))
        # 24 bits and a half step: strictly inside (0, 1), so both logarithms are finite. The last
        # half step is rounded away in float32, hence the bound.
        uniform = spare.view(torch.float32).copy_(_shift(x, 8, x)).add_(0.5).mul_(2.0**-24)
        uniform.clamp_(max=1 - 2.0**-24)
        return uniform.log_().neg_().log_().neg_()


def filter_support(scaled: Tensor, top_p: float, top_k: int) -> Tensor:
    """Set logits outside the top-k / top-p support to -inf.

    Args:
        scaled: float32 [n, V], logits after the temperature.
        top_p: keep the fewest tokens whose probability reaches this; 1 keeps all.
        top_k: keep this many; 0 keeps all. Applied before top_p, as in vLLM.
    """
    if top_k == 0 and top_p >= 1.0:
        return scaled
    ordered, order = scaled.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    if top_p < 1.0:
        probabilities = ordered.softmax(-1)
        # A token stays while those before it have not reached top_p; the first one always does.
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = -1.0
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    return torch.empty_like(scaled).scatter_(-1, order, ordered)


def perturbed_logits(
    logits: Tensor,
    noise: KeyedNoise,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Logits with noise, whose largest is the token drawn, and those without.

    Args:
        logits: float32 [n, V].
        noise: see KeyedNoise.
        keys: int32 [n, 2].
        positions: [n], index of the drawn token within its completion.
        temperature: 0 adds no noise.
        top_p: see `filter_support`.
        top_k: see `filter_support`.

    Returns:
        (perturbed, scaled), float32 [n, V]; -inf outside the support.
    """
    scaled = logits / temperature if temperature not in (0.0, 1.0) else logits
    scaled = filter_support(scaled, top_p, top_k)
    if temperature == 0.0:
        return scaled, scaled
    return noise.gumbel(keys, positions).add_(scaled), scaled


def sample(
    logits: Tensor,
    noise: KeyedNoise,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row; arguments as of `perturbed_logits`, temperature 0 is greedy.

    Returns:
        (token ids int64 [n], log-probs float32 [n]). The log-prob is that of the distribution the
        token was drawn from: temperature applied, renormalised over the support; for greedy
        decoding that of temperature 1.
    """
    perturbed, scaled = perturbed_logits(
        logits, noise, keys, positions, temperature=temperature, top_p=top_p, top_k=top_k
    )
    tokens = perturbed.argmax(-1)
    chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return tokens, chosen - scaled.logsumexp(-1)
