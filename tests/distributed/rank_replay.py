"""A run of a training config in layouts, one after the other, with a watched engine; on this rank.

All is the product's but the engine, which is registered as a user's would be and named in the
config: build_parts, GDPOTrainer, its metrics file.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from rank_layouts import platform  # prepares Megatron, so it comes first

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from watched_engine import Record, WatchedEngine, watched_draws  # isort: skip

from gdpo_megatron.build import build_parts
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.distributed import mesh as meshes
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.rollout.base import EngineSetup, RolloutRequest, SamplingParams, engines
from gdpo_megatron.trainer import GDPOTrainer

METRICS = ("update/loss", "optimizer/grad_norm", "update/mismatch_abs_diff_max")


def noise_of_rank() -> AbstractContextManager[Any]:
    """Sampling noise is keyed by the rank that draws it."""
    original = WatchedEngine.submit

    def submit(self: WatchedEngine, requests: Sequence[RolloutRequest], sampling: Any) -> None:
        rank = dist.get_rank()
        original(self, [replace(r, noise_key=r.noise_key ^ rank) for r in requests], sampling)

    return mock.patch.object(WatchedEngine, "submit", submit)


@contextmanager
def nudged_weights() -> Iterator[None]:
    """One tensor of the model is larger than it should be."""
    original = MegatronModel.load_hf

    @torch.no_grad()
    def load(self: MegatronModel, reader: Any) -> None:
        original(self, reader)
        for row, parameter in self.stage_rows:
            if row.layer == 2 and row.megatron[0] == "mlp.linear_fc2.weight":
                parameter.mul_(1.5)

    with mock.patch.object(MegatronModel, "load_hf", load):
        yield


MUTANTS: dict[str | None, Any] = {
    None: nullcontext,
    "noise_of_rank": noise_of_rank,
    "nudged_weights": nudged_weights,
}


def run(
    config: str,
    overrides: Sequence[str],
    folder: str,
    cases: dict[str, dict[str, Any]],
    record: Record | None,
) -> dict[str, Any]:
    """Train in each case.

    Args:
        config: path of the YAML file.
        overrides: of all cases, as on the command line.
        folder: for their run folders.
        cases: name -> {"layout": overrides, "replay": whether to train on the record's completions,
            "mutant": key of MUTANTS}.
        record: what to compare with.

    Returns:
        name -> {"made", "partings": see WatchedEngine, "metrics": name -> value of each step, on
        rank 0}.
    """
    return {
        name: _case(Path(config), overrides, Path(folder, name), case, record)
        for name, case in cases.items()
    }


def _case(
    path: Path, overrides: Sequence[str], run_dir: Path, case: dict[str, Any], record: Any
) -> dict[str, Any]:
    own = ["--run_dir", str(run_dir), "--rollout.engine", f"watched in {run_dir}"]
    config = load_config(RLConfig, path, [*overrides, *case["layout"], *own])
    with watched_draws() as draws, MUTANTS[case["mutant"]]():
        rollout = config.rollout

        def watches(sampling: SamplingParams) -> bool:  # not the canary's requests
            mine = (rollout.max_completion_tokens, rollout.stop)
            return (sampling.max_completion_tokens, sampling.stop) == mine

        def make_engine(setup: EngineSetup) -> Any:
            native = engines.get("native")(setup)
            return WatchedEngine(native, draws, watches, record, case["replay"])

        engines.add(config.rollout.engine, make_engine)
        parts = build_parts(
            platform,
            path.parent,
            model=config.model,
            parallel=config.parallel,
            precision=config.precision,
            memory=config.memory,
            seed=config.seed,
        )
        trainer = GDPOTrainer(config, path.parent, parts)
        assert trainer.run()
        engine: Any = trainer.engine
    result = {"partings": engine.partings, "made": engine.made, "metrics": {}}
    if parts.mesh.rank == 0:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        result["metrics"] = {name: [step[name] for step in steps] for name in METRICS}
    del trainer, parts
    meshes.destroy()
    gc.collect()
    return result
