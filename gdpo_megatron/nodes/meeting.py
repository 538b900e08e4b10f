"""The launchers of a job's nodes, who have met and talk over the store of the rendezvous.

`WatchedRendezvous` stands around one of torch's: it calls back when the nodes have met, before any
rank is started.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

_T = TypeVar("_T")

_PREFIX = "gdpo-"
_LEAVE_SECONDS = 2.0
"""For telling the others that this node leaves; they may be out of reach."""

_PINGS = 5


@dataclass(frozen=True, slots=True)
class Meeting:
    """This node among the others.

    Args:
        store: which all reach; its operations wait for a key, as long as its timeout is.
        node: this node's number.
        num_nodes: of the job.
    """

    store: Store
    node: int
    num_nodes: int

    def say(self, key: str, text: str) -> None:
        """Let the others know something of this node; it may be said again."""
        self.store.set(f"gdpo/{key}/{self.node}", text)

    def hear(self, key: str) -> list[str]:
        """What each node has said, by its number; waits for those that have not yet."""
        keys = [f"gdpo/{key}/{node}" for node in range(self.num_nodes)]
        return [bytes(it).decode() for it in self.store.multi_get(keys)]

    def gather(self, key: str, text: str) -> list[str]:
        """Say something, and hear what the others say; collective, once for a key."""
        self.say(key, text)
        return self.hear(key)

    def of_first(self, key: str, make: Callable[[], str]) -> str:
        """What the first node makes, on all; collective."""
        if self.node == 0:
            self.say(key, make())
        return bytes(self.store.get(f"gdpo/{key}/0")).decode()

    def beside(self) -> Meeting:
        """The same, over a connection of its own: for another thread."""
        return Meeting(_another(self.store), self.node, self.num_nodes)

    def clock_ahead(self) -> tuple[float, float]:
        """How far this node's clock is ahead of the first one's; collective.

        A node asks the first one for the time, and takes the middle between question and answer
        for the moment of the answer; the quickest of a few answers counts.

        Returns:
            Seconds ahead, and by how much that may be wrong at most.
        """
        if self.node > 0:
            return min((self._ask(number) for number in range(_PINGS)), key=lambda it: it[1])
        for node in range(1, self.num_nodes):
            for number in range(_PINGS):
                self.store.get(f"gdpo/ping/{node}/{number}")
                self.store.set(f"gdpo/pong/{node}/{number}", repr(time.time()))
        return 0.0, 0.0

    def _ask(self, number: int) -> tuple[float, float]:
        asked = time.time()
        self.store.set(f"gdpo/ping/{self.node}/{number}", "")
        there = float(self.store.get(f"gdpo/pong/{self.node}/{number}"))
        half = (time.time() - asked) / 2
        return asked + half - there, half


def _another(store: Store) -> Store:
    clone: Callable[[], Store] = store.clone  # pyright: ignore[reportAttributeAccessIssue]
    return clone()  # it is there; torch's stubs do not say so


class WatchedRendezvous(RendezvousHandler):
    """One of torch's rendezvous that says when the nodes have met.

    Args:
        inner: the rendezvous.
        met: called then, on each node, before ranks get their numbers.
    """

    def __init__(self, inner: RendezvousHandler, met: Callable[[Meeting], None]):
        self._inner = inner
        self._met = met

    def get_backend(self) -> str:
        return f"{_PREFIX}{self._inner.get_backend()}"

    @property
    def use_agent_store(self) -> bool:
        return self._inner.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        info = self._inner.next_rendezvous()
        self._met(Meeting(info.store, info.rank, info.world_size))
        return info

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        # Nodes do not join a job that runs. The question goes over the network from the loop that
        # looks after the ranks, and would stop it when the network is gone.
        return 0

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        return within(_LEAVE_SECONDS, self._inner.shutdown) or False


def watched(backend: str, met: Callable[[Meeting], None]) -> str:
    """Register a watched rendezvous beside torch's.

    Args:
        backend: torch's name of it.
        met: see WatchedRendezvous.

    Returns:
        The name of the watched one.
    """

    def create(given: RendezvousParameters) -> RendezvousHandler:
        settings: Mapping[str, object] = given.config
        inner = RendezvousParameters(
            backend=backend,
            endpoint=given.endpoint,
            run_id=given.run_id,
            min_nodes=given.min_nodes,
            max_nodes=given.max_nodes,
            local_addr=given.local_addr,
            **settings,
        )
        return WatchedRendezvous(get_rendezvous_handler(inner), met)

    name = f"{_PREFIX}{backend}"
    rendezvous_handler_registry.register(name, create)
    return name


def within(seconds: float, call: Callable[[], _T]) -> _T | None:
    """What a call over the network returns; None when it fails, or takes longer: it is left."""
    result: list[_T] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception:  # of torch's store, whatever it raises when the others are gone
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None
