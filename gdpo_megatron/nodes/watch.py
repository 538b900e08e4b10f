"""Noticing that a node is gone: each one says again and again that it is there.

Without it a rank that waits for a node whose cable is out waits for as long as a collective may
take: nothing closes its connections. A node that is gone, or that reports a failure, ends the ranks
of the others: no step can be finished without it. The bound of that is

    launch.node_timeout_seconds + ENDING_SECONDS

Two threads, since one of them may be stuck in an operation over the network that is gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import psutil

from gdpo_megatron.nodes.failures import NodeReport
from gdpo_megatron.nodes.meeting import Meeting, within

ENDING_SECONDS = 25.0
"""From noticing to the end of the launcher, at most."""

_BEAT_SECONDS = 2.0
_GRACE_SECONDS = 4.0
"""For ranks to say what they see themselves, before they are ended."""

_LEAVE_SECONDS = 6.0
"""For the launcher to end by itself, once its ranks are gone."""

_REPORT_SECONDS = 10.0
"""For other nodes to report, before it is said what came first."""


class Watch:
    """This node's part in watching one another; begins when it is made, on all nodes together.

    Args:
        meeting: the nodes.
        hosts: their names.
        place: host and port where they meet.
        seconds: after which one that has not been heard of is gone.
        is_over: whether this node's ranks have all ended; what others do does not matter then.
        give_up: called when this launcher should have ended long ago, but has not.
    """

    def __init__(
        self,
        meeting: Meeting,
        hosts: Sequence[str],
        place: str,
        seconds: float,
        *,
        is_over: Callable[[], bool],
        give_up: Callable[[], None],
    ):
        self.reason = ""
        """Why this node's ranks were ended from here; empty as long as they were not."""
        self._meeting = meeting
        self._hosts = hosts
        self._place = place
        self._seconds = seconds
        self._is_over = is_over
        self._give_up = give_up
        self._heard = dict.fromkeys(range(meeting.num_nodes), time.monotonic())
        self._cut = False
        self._reported: list[NodeReport | None] = [None] * meeting.num_nodes
        self._closed = threading.Event()
        self._telling = meeting.beside()  # a connection that is made when there is a network
        meeting.say("end", "")
        meeting.gather("beat", "0")
        meeting.hear("end")
        for run in (self._beat, self._look):
            threading.Thread(target=run, daemon=True).start()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def exchange(self, own: NodeReport) -> list[NodeReport | None]:
        """Tell the others why this node ends, and hear what they tell, for a while.

        Args:
            own: of this node.

        Returns:
            Reports by node; None of one that has told nothing.
        """
        self._reported[self._meeting.node] = own
        if not self._silent(self._meeting.node):  # else nothing gets to the others
            within(_REPORT_SECONDS, lambda: self._exchange(own))
        return list(self._reported)

    def _silent(self, node: int) -> bool:
        return time.monotonic() - self._heard[node] > self._seconds

    def _exchange(self, own: NodeReport) -> None:
        meeting = self._telling
        awaited = [it for it in range(meeting.num_nodes) if not self._silent(it)]
        meeting.say("end", own.dump())
        end = time.monotonic() + _REPORT_SECONDS
        # One of them keeps what all have told, so it stays until they have heard it.
        while time.monotonic() < end and not all(self._reported[it] for it in awaited):
            self._take(meeting.hear("end"))
            time.sleep(0.1)
        time.sleep(0.5)

    def _take(self, texts: Sequence[str]) -> None:
        for node, text in enumerate(texts):
            if text and node != self._meeting.node:
                self._reported[node] = NodeReport.load(text)

    def _beat(self) -> None:
        """Say that this node is there, and hear who else is."""
        meeting, number, before = self._meeting.beside(), 0, [""] * self._meeting.num_nodes
        pause = min(_BEAT_SECONDS, self._seconds / 5)
        while not self._closed.wait(pause):
            number += 1
            try:
                meeting.say("beat", str(number))
                beats = meeting.hear("beat")
                self._take(meeting.hear("end"))
            except Exception:  # of the store: torch has no class of its own for it
                self._cut = True
                return
            now = time.monotonic()
            self._heard |= {n: now for n, it in enumerate(beats) if it != before[n]}
            self._heard[meeting.node] = now
            before = beats

    def _look(self) -> None:
        """End this node's ranks when it makes no sense to go on."""
        while not self._closed.wait(0.2):
            if self._is_over():
                return
            problem = self._problem()
            if problem is None:
                continue
            # Ranks that notice it themselves say more; a launcher that ends anyway is left alone.
            patience = 0.0 if "not been heard" in problem else _GRACE_SECONDS
            if self._closed.wait(patience) or self._is_over():
                return
            self.reason = problem
            for process in psutil.Process().children():
                _end_group(process.pid)
            if not self._closed.wait(_LEAVE_SECONDS):
                self._give_up()
            return

    def _problem(self) -> str | None:
        node = self._meeting.node
        if self._silent(node):
            return (
                f"the node where all meet ({self._place}) has not been heard of for "
                f"{self._seconds:g} s (launch.node_timeout_seconds): it is gone, or the network is"
            )
        for other in self._heard:
            if self._silent(other) and not self._reported[other]:
                return (
                    f"node {other} ({self._hosts[other]}) has not been heard of for "
                    f"{self._seconds:g} s (launch.node_timeout_seconds): it is gone, or the "
                    "network to it is"
                )
        for other, report in enumerate(self._reported):
            if report is not None and other != node:
                return f"node {other} ({self._hosts[other]}) has ended"
        if self._cut:
            return f"the launcher on the node where all meet ({self._place}) has ended"
        return None


def _end_group(pid: int) -> None:
    """End a rank and all that is in its session's group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
