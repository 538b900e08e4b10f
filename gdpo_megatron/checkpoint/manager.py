"""Checkpoints of a run: Megatron's distributed format plus what the loop needs to go on.

    <run_dir>/checkpoints/step_00000050/   model, optimizer, schedule (any layout can load them)
                          .../run.json     step, policy_version, sampler
                          .../rng_00000.json   random state of each rank
                          .../carried_00000.json   groups that its engine goes on with, if any
                          .../hf/      config.json, tokenizer: what makes it a model folder

A checkpoint is written beside its place and renamed when every rank is done, so a folder that has
the name is whole. The newest one is where a run goes on.
"""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from gdpo_megatron.conversion.model_folder import HF_FILES
from gdpo_megatron.distributed.mesh import Mesh
from gdpo_megatron.errors import InputError
from gdpo_megatron.platform.megatron_versions import megatron_version, shown
from gdpo_megatron.policy.megatron_policy import MegatronPolicy


def saved_after(step: int) -> str:
    """What a run that ends early says of its newest checkpoint."""
    return f"the run is saved after step {step}; the same command goes on there"


def goes_on_from(steps: Sequence[int]) -> str:
    """What a run that ends without saving says, given the steps that have a checkpoint."""
    if not steps:
        return "the run has no checkpoint yet; the same command starts it again"
    return f"the same command goes on from the checkpoint of step {steps[-1]}"


_NAME = re.compile(r"step_(\d{8})")


class CheckpointManager:
    """Saves and loads the checkpoints of one run folder.

    Args:
        run_dir: folder of the run.
        keep_last: how many checkpoints stay.
        mesh: the trainer's mesh.
        write_hf_files: writes the model's config and tokenizer into a folder. Going on does not
            need them; with them a checkpoint can be converted, generated from, started from.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int,
        mesh: Mesh,
        write_hf_files: Callable[[Path], None] | None = None,
    ):
        self._folder = run_dir / "checkpoints"
        self._keep_last, self._mesh = keep_last, mesh
        self._write_hf_files = write_hf_files

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        if not self._folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def save(
        self,
        step: int,
        policy: MegatronPolicy,
        state: dict[str, Any],
        carried: Sequence[dict[str, Any]] = (),
    ) -> Path:
        """Write the checkpoint of `step`; collective.

        Args:
            step: steps that are done.
            policy: what is saved.
            state: JSON-able state of the loop, the same on all ranks.
            carried: JSON-able groups that this rank's engine goes on with.
        """
        final = self._folder / f"step_{step:08d}"
        partial = final.with_suffix(".partial")
        if self._mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(policy.sharded_state_dict(loading=False), str(partial))
        (partial / f"rng_{self._mesh.rank:05d}.json").write_text(json.dumps(_rng_state()))
        if carried:
            path = partial / f"carried_{self._mesh.rank:05d}.json"
            path.write_text(json.dumps(list(carried)))
        dist.barrier()
        if self._mesh.rank == 0:
            run = {"step": step, "world_size": self._mesh.world_size, **state}
            (partial / "run.json").write_text(json.dumps(run, indent=2))
            if self._write_hf_files is not None:
                (partial / HF_FILES).mkdir()
                self._write_hf_files(partial / HF_FILES)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self.steps()[: -self._keep_last]:
                shutil.rmtree(self._folder / f"step_{old:08d}")
        dist.barrier()
        return final

    def carried(self, step: int) -> list[dict[str, Any]]:
        """The `carried` of all ranks that saved the checkpoint of a step."""
        files = sorted((self._folder / f"step_{step:08d}").glob("carried_*.json"))
        return [group for file in files for group in json.loads(file.read_text())]

    def load_latest(self, policy: MegatronPolicy) -> dict[str, Any] | None:
        """Load the newest checkpoint into the policy; collective.

        Returns:
            The state given to `save`, with "step"; None where the run has no checkpoint yet.

        Raises:
            InputError: a later version of megatron-core has saved it, in a form of its own.
        """
        steps = self.steps()
        dist.barrier()  # all ranks have looked before anyone can write
        if not steps:
            return None
        folder = self._folder / f"step_{steps[-1]:08d}"
        _check_version(folder)
        loaded: Any = dist_checkpointing.load(policy.sharded_state_dict(loading=True), str(folder))
        policy.load_state_dict(loaded)
        run = json.loads((folder / "run.json").read_text())
        # Another world size has no state of its own per rank to go back to.
        if run["world_size"] == self._mesh.world_size:
            path = folder / f"rng_{self._mesh.rank:05d}.json"
            _set_rng_state(json.loads(path.read_text()))
        return run


def _check_version(folder: Path) -> None:
    # 0.19 keeps what is not sharded among the tensors; 0.16 wants a file, and 0.19 reads both.
    if megatron_version() < (0, 19, 0) and not (folder / "common.pt").is_file():
        raise InputError(
            f"{folder}: saved by megatron-core 0.19 or later, whose checkpoints "
            f"{shown(megatron_version())} cannot go on with; install that one again, or start a "
            "new run with model.hf_path set to this folder"
        )


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    raw = bytearray(base64.b64decode(state["torch"]))
    torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
