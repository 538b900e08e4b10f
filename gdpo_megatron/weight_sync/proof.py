"""What is checked of a sync: what the engine is given, and what it says that it has.

| check        | sees                                                                   | when     |
|--------------|------------------------------------------------------------------------|----------|
| completeness | a name that is missing, doubled, unknown or out of order; shape, dtype | always   |
| finite       | NaN and infinities, by name                                            | always   |
| version      | an engine that took nothing, or has another version afterwards         | always   |
| engine       | an engine that refuses the weights, fails or hangs in any of its calls | always   |
| replicas     | data-parallel replicas of the policy that differ                       | checksum |
| checksum     | a tensor that is not the policy's, between its shards and the engine   | checksum |
| resident     | a tensor that the engine holds and that is not the policy's            | checksum |
| canary       | what is left: caches, kernels, names that mean something else          | canary   |

A tensor is looked at when the engine draws it, and the engine reaches the end of the stream only
when everything was right: it has no version of weights that were not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdpo_megatron.distributed.exchange import gather_texts
from gdpo_megatron.errors import InputError
from gdpo_megatron.rollout.base import RolloutEngine
from gdpo_megatron.rollout.failure import reason_of, tell
from gdpo_megatron.rollout.stall import StallWatch
from gdpo_megatron.weight_sync.checksum import TensorSum

Check = Literal[
    "completeness", "finite", "version", "engine", "replicas", "checksum", "resident", "canary"
]

_NUM_NAMED = 3


class SyncFault(InputError):
    """The engine does not have the policy's weights, or not only finite ones; the run stops.

    Args:
        checks: what found it.
        problems: lines for the user.
    """

    def __init__(self, checks: Iterable[Check], problems: Iterable[str]):
        super().__init__(problems)
        self.checks = frozenset(checks)

    @property
    def weights_are_finite(self) -> bool:
        """Whether the policy may be worth saving."""
        return "finite" not in self.checks


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found on this rank."""

    check: Check
    text: str


def engine_finding(error: Exception, call: str) -> Finding:
    """What a call of the engine raised; its traceback is printed."""
    finding = Finding("engine", f"the engine failed in {call}: {reason_of(error)}")
    tell(f"rank {torch.distributed.get_rank()}: {finding.text}", error)
    return finding


class _Refused(RuntimeError):
    """Ends a stream that the engine must not take."""


class Delivery:
    """One sync's stream of tensors, as it is checked on this rank.

    Args:
        shapes: of the tensors, by name, in order.
        dtype: of all of them.
        sums: how their checksums are made; None where they are not compared.
        expected: int64 [tensors], the policy's; None likewise.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        sums: Mapping[str, TensorSum] | None = None,
        expected: Tensor | None = None,
    ):
        self._shapes, self._dtype = shapes, dtype
        self._sums, self._expected = sums, expected
        self._source_failed = False
        self.findings: list[Finding] = []
        self.num_tensors = self.num_bytes = 0
        self.is_complete = False

    def deliver(
        self,
        engine: RolloutEngine,
        tensors: Iterable[tuple[str, Tensor]],
        version: int,
        watch: StallWatch,
    ) -> None:
        """Give an engine the tensors; what is found is in `findings`.

        The tensors are drawn to their end in any case: other ranks take part in making them.

        Raises:
            Exception: the policy's side failed.
        """
        source = self._own_failure(iter(tensors))
        try:
            with watch.call("no progress of load_weights"):
                engine.load_weights(self._checked(watch.outside(source)), version)
        except Exception as error:
            if self._source_failed:
                raise
            if not self.findings:  # what was refused here may come back in another wrapping
                self.findings.append(engine_finding(error, "load_weights"))
        for _ in source:
            pass
        if self.findings:
            return
        if not self.is_complete:
            total = len(self._shapes)
            self._found("version", f"the engine took {self.num_tensors} of {total} tensors")
        elif engine.policy_version != version:
            has = engine.policy_version
            self._found("version", f"the engine has version {has} after a sync of {version}")

    def look_at_resident(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Compare what an engine holds with the policy's checksums; returns how many it gave."""
        assert self._sums is not None
        found: dict[str, Tensor] = {}
        for name, tensor in tensors:
            shape = self._shapes.get(name)
            if name in found or shape != tuple(tensor.shape) or tensor.dtype != self._dtype:
                self._found("resident", f"the engine holds {_tensor_text(name, tensor)}: no such")
            else:
                found[name] = self._sums[name].of(tensor)
        self._compare("resident", found, "that the engine holds")
        return len(found)

    def _own_failure(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from tensors
        except Exception:
            self._source_failed = True
            raise

    def _checked(self, source: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        expected = iter(self._shapes.items())
        extremes: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, tensor in source:
            self._check_next(next(expected, None), name, tensor)
            # One pass without a copy: NaN goes through minimum and maximum.
            extremes[name] = torch.stack(torch.aminmax(tensor))
            if self._sums is not None:
                found[name] = self._sums[name].of(tensor)
            self.num_tensors += 1
            self.num_bytes += tensor.nbytes
            yield name, tensor
        missing = [name for name, _ in expected]
        if missing:
            self._refuse("completeness", f"{_number(missing)} did not come: {_named(missing)}")
        # Looked at together: on a device, each look would wait for it.
        finite = torch.stack(list(extremes.values())).isfinite().all(1).tolist()
        spoilt = [name for name, good in zip(extremes, finite, strict=True) if not good]
        if spoilt:
            self._found(
                "finite", f"{_number(spoilt)} with NaN or infinite values: {_named(spoilt)}"
            )
        if found:
            self._compare("checksum", found, "that the engine was given")
        if self.findings:
            raise _Refused("the weights are not the policy's")
        self.is_complete = True

    def _check_next(
        self, expected: tuple[str, tuple[int, ...]] | None, name: str, tensor: Tensor
    ) -> None:
        wanted = "nothing more"
        if expected is not None:
            if expected == (name, tuple(tensor.shape)) and tensor.dtype == self._dtype:
                return
            wanted = f"'{expected[0]}' {list(expected[1])} {self._dtype}"
        self._refuse(
            "completeness",
            f"tensor {self.num_tensors + 1} of {len(self._shapes)} is {_tensor_text(name, tensor)}"
            f"; expected {wanted}",
        )

    def _compare(self, check: Check, found: Mapping[str, Tensor], what: str) -> None:
        if not found:
            return
        assert self._expected is not None
        place = {name: i for i, name in enumerate(self._shapes)}
        numbers = torch.stack(list(found.values())).tolist()
        expected = self._expected.tolist()
        wrong = [
            f"'{name}' expected {_hex(expected[place[name]])}, found {_hex(number)}"
            for name, number in zip(found, numbers, strict=True)
            if number != expected[place[name]]
        ]
        if wrong:
            shown = "; ".join(wrong[:_NUM_NAMED])
            count = f"{len(wrong)} of {len(found)} tensors {what}"
            self._found(check, f"not the policy's: {count}: {shown}")

    def _found(self, check: Check, text: str) -> None:
        self.findings.append(Finding(check, text))

    def _refuse(self, check: Check, text: str) -> None:
        self._found(check, text)
        raise _Refused(text)


def agree(findings: Sequence[Finding], version: int, device: torch.device) -> None:
    """Stop on all ranks where one of them has found something; collective.

    Raises:
        SyncFault: of what all ranks have found, the same lines once.
    """
    found = found_anywhere(findings, device)
    if found:
        lines = [f"weight sync of version {version}, {it.text}" for it in found]
        raise SyncFault({it.check for it in found}, lines)


def found_anywhere(findings: Sequence[Finding], device: torch.device) -> list[Finding]:
    """What all ranks have found, with the ranks; collective, and equal on all."""
    own = json.dumps([[it.check, it.text] for it in findings])
    ranks = [json.loads(text) for text in gather_texts(own, device)]
    who: dict[tuple[Check, str], list[int]] = {}
    for rank, them in enumerate(ranks):
        for check, text in them:
            who.setdefault((check, text), []).append(rank)
    return [
        Finding(check, f"{check} (rank {', '.join(map(str, of_ranks))}): {text}")
        for (check, text), of_ranks in who.items()
    ]


def replica_findings(sums: Tensor, names: Iterable[str]) -> list[Finding]:
    """Whether all replicas of the policy have the same checksums; collective over all ranks."""
    low, high = sums.clone(), sums.clone()
    torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX)
    apart = [name for name, same in zip(names, (low == high).tolist(), strict=True) if not same]
    if not apart:
        return []
    text = f"{_number(apart)} differ between replicas of the policy: {_named(apart)}"
    return [Finding("replicas", text)]


def _number(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _named(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NUM_NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NUM_NAMED]) + more


def _tensor_text(name: str, tensor: Tensor) -> str:
    return f"'{name}' {list(tensor.shape)} {tensor.dtype}"


def _hex(number: int) -> str:
    return f"{number % (1 << 64):016x}"
