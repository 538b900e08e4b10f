"""What it costs that ranks agree on FP8 scales: the largest values' all-reduce, in one MLP.

    torchrun --nproc-per-node 2 tools/bench_fp8_scales.py

Forward and backward of linear_fc1 and linear_fc2 over all ranks, in turns with scales of the whole
tensors and of each rank's part. Prints the medians of both, and of the all-reduce by itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from gdpo_megatron.platform import detect_platform

platform = detect_platform()
platform.prepare_megatron()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from gdpo_megatron.config.schema import ParallelConfig  # noqa: E402
from gdpo_megatron.distributed import mesh as meshes  # noqa: E402
from gdpo_megatron.policy.fp8 import amaxes  # noqa: E402
from gdpo_megatron.policy.fp8_linear import ProductLayout, fp8_product  # noqa: E402


def seconds(function: Callable[[], object]) -> float:
    """Of one call, all ranks starting together."""
    dist.barrier()
    began = time.perf_counter()
    function()
    platform.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=512, help="(512)")
    parser.add_argument("--hidden", type=int, default=1536, help="(1536)")
    parser.add_argument("--columns", type=int, default=8960, help="of the MLP, all ranks (8960)")
    parser.add_argument("--rounds", type=int, default=9, help="(9)")
    options = parser.parse_args()
    world = int(os.environ["WORLD_SIZE"])
    mesh = meshes.initialize(ParallelConfig(tensor_model_parallel_size=world), platform)
    columns = options.columns // world
    x, up, down = (
        torch.randn(shape, device=platform.device, requires_grad=True)
        for shape in ((options.tokens, options.hidden),) + ((columns, options.hidden),) * 2
    )
    whole = ProductLayout(scale_group=mesh.tp_cp_group, tp_group=mesh.tp_group)

    def mlp(layout: ProductLayout) -> None:
        hidden = fp8_product(x, up, replace(layout, sum_dx=True))
        y: Tensor = fp8_product(hidden, down.t().contiguous(), layout)
        dist.all_reduce(y.detach(), group=mesh.tp_group)
        y.sum().backward()

    ways: dict[str, Callable[[], object]] = {
        "scales of whole tensors": lambda: mlp(whole),
        "scales of each rank's part": lambda: mlp(replace(whole, scale_group=None)),
        "one all-reduce of two values": lambda: amaxes(x[:1], up[:1], group=mesh.tp_cp_group),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # the first call of each is not counted
        way()
    for _ in range(options.rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    if mesh.rank == 0:
        for name, taken in times.items():
            print(f"{name}: {1e3 * statistics.median(taken):.2f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
