"""Print the error of an FP8 linear layer, forward and gradients, against float64.

Layers and sizes are those of Qwen2.5-1.5B; values are drawn, with the kinds of outliers that
trained models have. An error is |result - exact| / |exact|, Euclidean: of y and dx that of a token,
of dW that of an output, the median of them. bfloat16 is there to compare with. Takes a CPU two
minutes. The table is in docs/precision.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from gdpo_megatron.platform import detect_platform

detect_platform().prepare_megatron()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from gdpo_megatron.policy.fp8_linear import fp8_product  # noqa: E402

LAYERS = {
    "linear_qkv": (1536, 2048),
    "linear_proj": (1536, 1536),
    "linear_fc1": (1536, 17920),
    "linear_fc2": (8960, 1536),
}
"""Inputs and outputs."""


def normal(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Nothing stands out."""
    return torch.randn(shape, generator=draw)


def channels(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """A few columns are larger in every row."""
    x = normal(shape, draw)
    x[:, torch.randperm(shape[1], generator=draw)[: shape[1] // 256]] *= 30
    return x


def massive(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """One value dwarfs all others."""
    x = normal(shape, draw)
    x[0, 0] = 20000.0
    return x


def spread(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Rows of very different size, as gradients of tokens have."""
    return normal(shape, draw) * torch.exp(2 * torch.randn(shape[0], 1, generator=draw))


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
VALUES: dict[str, tuple[Draw, Draw]] = {
    "normal": (normal, normal),
    "x: columns 30 times as large": (channels, normal),
    "x: one value of 20000": (massive, normal),
    "dy: rows of different size": (normal, spread),
}
"""How x and dy are drawn; weights are normal."""


def results(product: Callable[[Tensor, Tensor], Tensor], *operands: Tensor) -> list[Tensor]:
    """(y, dx, dW) of a product of x and W, given (x, W, dy)."""
    x, w, dy = operands
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = product(x, w)
    y.backward(dy)
    assert x.grad is not None and w.grad is not None
    return [y.detach(), x.grad, w.grad]


def plain(x: Tensor, w: Tensor) -> Tensor:
    """The product without FP8."""
    return x @ w.t()


def errors(tokens: int, sizes: tuple[int, int], draws: tuple[Draw, Draw], seed: int) -> list[float]:
    """Errors of y, dx and dW: in FP8, then in bfloat16."""
    draw, (inputs, outputs) = torch.Generator().manual_seed(seed), sizes
    x, dy = draws[0]((tokens, inputs), draw), draws[1]((tokens, outputs), draw)
    w = normal((outputs, inputs), draw) * 0.02
    exact = results(plain, x.double(), w.double(), dy.double())
    ways = results(fp8_product, x, w, dy) + results(
        plain, x.bfloat16(), w.bfloat16(), dy.bfloat16()
    )
    return [_error(way, right) for way, right in zip(ways, exact * 2, strict=True)]


def _error(way: Tensor, right: Tensor) -> float:
    return float(((way.double() - right).norm(dim=1) / right.norm(dim=1)).median())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=256, help="rows of x (256)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| layer | values | y | dx | dW | bf16: y | dx | dW |")
    print("|---|---|---|---|---|---|---|---|")
    for layer, sizes in LAYERS.items():
        for values, draws in VALUES.items():
            row = errors(options.tokens, sizes, draws, options.seed)
            print(f"| {layer} | {values} | {' | '.join(f'{e:.1e}' for e in row)} |", flush=True)


if __name__ == "__main__":
    main()
