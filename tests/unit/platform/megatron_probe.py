"""Trains one step on real Megatron with parts of the CPU layer taken away; prints what happened.

    python megatron_probe.py MODEL_CONFIG_FOLDER CASE ...

A case is "all" (nothing taken away), "rule:NAME", "patch:MODULE", "stand-in:MODULE" or "hook" (all
of it). Each runs in a process of its own, forked before Megatron is imported. Prints a JSON object:
case -> report.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gdpo_megatron.platform import megatron_cpu
from gdpo_megatron.platform.cpu import CpuPlatform


def _keep_calls(rewriter: Any, node: ast.Call) -> ast.AST:
    """visit_Call without the rule "cuda call"."""
    if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
        return rewriter.generic_visit(node)
    return _VISIT_CALL(rewriter, node)


_INSTALL = megatron_cpu.install
_VISIT_CALL = megatron_cpu._Rewriter.visit_Call
_WITHOUT_RULE: dict[str, Any] = {
    "namespace": mock.patch.object(
        megatron_cpu._Rewriter, "visit_Attribute", lambda self, node: self.generic_visit(node)
    ),
    "device literal": mock.patch.object(megatron_cpu, "_is_cuda_literal", lambda node: False),
    "cuda call": mock.patch.object(megatron_cpu._Rewriter, "visit_Call", _keep_calls),
    "pinned memory": mock.patch.object(megatron_cpu, "_is_pinned", lambda keyword: False),
    "type name": mock.patch.object(megatron_cpu, "_TYPE_NAMES", {}),
}


def _take_away(case: str) -> Any:
    kind, _, name = case.partition(":")
    if kind == "rule":
        return _WITHOUT_RULE[name]
    if kind == "patch":
        rest = tuple(patch for patch in megatron_cpu.PATCHES if patch.module != name)
        assert len(rest) == len(megatron_cpu.PATCHES) - 1
        return mock.patch.object(megatron_cpu, "PATCHES", rest)
    if kind == "stand-in":
        others = tuple(it for it in megatron_cpu.STAND_INS if it.module != name)
        assert len(others) == len(megatron_cpu.STAND_INS) - 1
        return mock.patch.object(megatron_cpu, "STAND_INS", others)
    if kind == "hook":
        return mock.patch.object(megatron_cpu, "install", lambda: None)
    assert case == "all", case
    return nullcontext()


def _train_one_step(folder: Path, platform: CpuPlatform) -> dict[str, float]:
    from gdpo_megatron.checkpoint import CheckpointManager  # noqa: F401  # its modules count too
    from gdpo_megatron.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
    from gdpo_megatron.conversion.families import load_architecture
    from gdpo_megatron.conversion.hf_io import RandomWeights
    from gdpo_megatron.data.batching import make_micro_batches
    from gdpo_megatron.data.micro_batching import MicroBatching
    from gdpo_megatron.distributed import mesh as meshes
    from gdpo_megatron.policy.megatron_policy import MegatronPolicy
    from gdpo_megatron.sft import CrossEntropy

    parallel, arch = ParallelConfig(), load_architecture(folder)
    policy = MegatronPolicy(
        arch,
        optimizer=OptimizerConfig(),
        total_updates=1,
        make_reader=lambda: RandomWeights(arch, 0),
        parallel=parallel,
        precision=PrecisionConfig(),
        max_sequence_length=16,
        mesh=meshes.initialize(parallel, platform),
        platform=platform,
    )
    batches = make_micro_batches([([1, 2], [3, 4, 5])], MicroBatching(micro_batch_size=1))
    stats = policy.update(batches, CrossEntropy(3), temperature=1.0)
    policy.sharded_state_dict(loading=False)
    return stats


def _fork_of_the_tracker() -> dict[str, bool]:
    """Draw in a fork of Megatron's RNG tracker, twice."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    outside = torch.get_rng_state()
    tracker.add("probe", 7)
    draws = []
    for _ in range(2):
        with tracker.fork("probe"):
            draws.append(torch.rand(3))
    left_alone = torch.equal(torch.get_rng_state(), outside)
    torch.manual_seed(7)
    expected = torch.rand(3), torch.rand(3)
    return {
        "left_alone": left_alone,
        "own_stream": all(torch.equal(a, b) for a, b in zip(draws, expected, strict=True)),
    }


def _router_logits() -> list[list[float]]:
    """Two tokens through the linear layer of a router with two experts."""
    from megatron.core.transformer.moe import moe_utils

    weight = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    return moe_utils.router_gating_linear(torch.eye(2), weight, None, torch.float32).tolist()


def _splits() -> str:
    """Type of the split sizes that the token dispatcher hands to all_to_all."""
    from megatron.core.transformer.moe import token_dispatcher

    splits: Any = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    return type(splits).__name__


def _rotary_positions() -> list[float]:
    """Positions of the second of two context-parallel ranks, out of eight."""
    from megatron.core.models.common.embeddings import rope_utils

    group: Any = mock.Mock(size=lambda: 2, rank=lambda: 1)
    return rope_utils.get_pos_emb_on_this_cp_rank(torch.arange(8.0), 0, group).tolist()


def _attempt(action: Any) -> Any:
    try:
        return action()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def _report(folder: Path) -> dict[str, Any]:
    import torch.cuda as before

    functions = {name: value for name, value in vars(before).items() if callable(value)}
    platform = CpuPlatform()
    report: dict[str, Any] = {}
    try:
        platform.prepare_megatron()
        platform.prepare_megatron()  # the second time it does nothing
        report["stats"] = _train_one_step(folder, platform)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        report["error"] = f"{type(error).__name__}: {error}"
        report["where"] = f"{frame.filename}:{frame.lineno}"
    from megatron.core import jit

    report["fork"] = _attempt(_fork_of_the_tracker)
    report["router_logits"] = _attempt(_router_logits)
    report["rotary_positions"] = _attempt(_rotary_positions)
    report["splits"] = _attempt(_splits)
    report["sites"] = dict(megatron_cpu.rewritten_sites)
    report["jit_fuser"] = f"{jit.jit_fuser.__module__}.{jit.jit_fuser.__name__}"
    report["num_hooks"] = sum(isinstance(it, megatron_cpu._Finder) for it in sys.meta_path)
    try:
        _INSTALL()
    except RuntimeError as error:
        report["install_again"] = str(error)
    report["torch_untouched"] = torch.cuda is before and all(
        vars(before).get(name) is value for name, value in functions.items()
    )
    report["files"] = [
        module.__file__
        for name, module in sorted(sys.modules.items())
        if name.startswith("megatron.core") and module.__file__
    ]
    return report


def _child(case: str, folder: Path, connection: Any) -> None:
    warnings.simplefilter("ignore")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    # As under torchrun: a port that is chosen now and opened later may be another's by then.
    os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with _take_away(case):
        connection.send(_report(folder))


def main(folder: Path, cases: list[str]) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    reports: dict[str, Any] = {}
    for first in range(0, len(cases), 2):
        running = []
        for case in cases[first : first + 2]:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(case, folder, theirs))
            process.start()
            theirs.close()
            running.append((case, process, ours))
        for case, process, ours in running:
            try:
                reports[case] = ours.recv()
            except EOFError:
                reports[case] = {"error": "the process died"}
            process.join()
    return reports


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
