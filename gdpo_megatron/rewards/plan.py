"""Who runs which reward: the lanes of a suite, and the settings its processes are started with.

A lane is a queue with workers of its own:

    shared      sync rewards that keep no state: num_workers workers, one job at a time each
    async       async rewards: one worker, whose event loop has many jobs at a time
    one each    for a reward that keeps state: one worker, one job at a time, in order of sample_id
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gdpo_megatron.rewards.resolve import ResolvedReward


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A queue of jobs and those who take from it.

    Args:
        columns: the rewards that it runs, by their place in the config.
        num_workers: processes.
        num_concurrent: jobs that one of them has at a time.
        is_async: they run an event loop.
    """

    columns: tuple[int, ...]
    num_workers: int = 1
    num_concurrent: int = 1
    is_async: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that the pool and its workers are told; plain values, sent as JSON.

    Args:
        lanes: who runs what.
        rewards: per column, the fields of a RewardConfig without weight and condition.
        base_dir: folder that `./file.py:function` starts from.
        sandbox: the fields of the sandbox section.
        import_path: sys.path of the trainer.
        sample_timeout_seconds: for one sample in one reward.
        memory_bytes: resident memory that a worker may come to.
        log_path: file for what rewards print; None drops it.
    """

    lanes: tuple[Lane, ...]
    rewards: tuple[Mapping[str, Any], ...]
    base_dir: str
    sandbox: Mapping[str, Any]
    import_path: tuple[str, ...]
    sample_timeout_seconds: float
    memory_bytes: int
    log_path: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """What `as_json` gave."""
        lanes = tuple(
            Lane(**{**lane, "columns": tuple(lane["columns"])}) for lane in values["lanes"]
        )
        return cls(**{**values, "lanes": lanes})


def lanes_of(
    rewards: Sequence[ResolvedReward], num_workers: int, max_concurrent_async: int
) -> tuple[Lane, ...]:
    """The lanes that the rewards of a run need."""
    columns = range(len(rewards))
    stateful = [k for k in columns if rewards[k].fn.stateful]
    others = [k for k in columns if not rewards[k].fn.stateful]
    sync = tuple(k for k in others if not rewards[k].fn.is_async)
    waiting = tuple(k for k in others if rewards[k].fn.is_async)
    lanes = [Lane(columns=(k,), is_async=rewards[k].fn.is_async) for k in stateful]
    if sync:
        lanes.append(Lane(columns=sync, num_workers=num_workers))
    if waiting:
        lanes.append(Lane(columns=waiting, num_concurrent=max_concurrent_async, is_async=True))
    return tuple(lanes)
