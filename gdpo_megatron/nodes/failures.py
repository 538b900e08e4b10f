"""Which rank of a job was the first to fail, and what is said about it.

A rank that dies takes its peers along: they see its connections close, or wait in vain. So an error
that speaks of a lost peer is a consequence where there is any other; beyond that, the earliest
counts. Times are those of the exceptions, and of the deaths of ranks that could not say anything.
"""

from __future__ import annotations

import json
import os
import select
import signal
import textwrap
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from gdpo_megatron.platform.health import LOST_PEER

SAID = 2
"""Exit code of a rank that has said in one line what a person has to mend."""

_LAST_LINES = 15

# By these a launcher ends ranks; by the others they end themselves.
_SENT = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """How a rank ended.

    Args:
        rank: its number.
        node: its node's number.
        host: its node's name.
        pid: of its process.
        code: its exit code; minus the signal that ended it.
        died: when, since 1970, by the first node's clock.
        seconds: when its exception was raised; else as `died`.
        lines: the end of what it has said.
        file: with the rest.
        problems: what it has told a person to mend.
        recorded: whether it has left an exception.
    """

    rank: int
    node: int
    host: str
    pid: int
    code: int
    died: float
    seconds: float
    lines: Sequence[str] = ()
    file: str = ""
    problems: Sequence[str] = ()
    recorded: bool = False

    @property
    def lost_a_peer(self) -> bool:
        """Whether it speaks of another rank that is gone."""
        return any(map(LOST_PEER.search, self.lines))

    @property
    def ended_by(self) -> str:
        """Its exit code in words."""
        if self.code >= 0:
            return f"exit code {self.code}"
        names = {it.value: it.name for it in signal.Signals}
        return names.get(-self.code, f"signal {-self.code}")

    @property
    def what(self) -> str:
        """One line."""
        if not (self.recorded and self.lines):
            return self.ended_by
        return textwrap.shorten(self.lines[-1], 160, placeholder=" ...")


@dataclass(slots=True, kw_only=True)
class NodeReport:
    """What a node tells the others when it ends before its time.

    Args:
        reason: that is of no rank: a node is gone.
        failures: of its ranks; the first one is the one that counts.
    """

    reason: str = ""
    failures: list[RankFailure] = field(default_factory=list[RankFailure])

    def dump(self) -> str:
        """As text, of the first failures only."""
        few = [asdict(it) for it in self.failures[:4]]
        return json.dumps({"reason": self.reason, "failures": few})

    @classmethod
    def load(cls, text: str) -> NodeReport:
        """The inverse of `dump`."""
        data = json.loads(text)
        failures = [RankFailure(**it) for it in data["failures"]]
        return cls(reason=data["reason"], failures=failures)


# ---- in a rank -----------------------------------------------------------------------------------


def record(error: BaseException, problems: Sequence[str] = ()) -> bool:
    """Leave an exception where the launcher looks for it, as torchrun wants it.

    Args:
        error: that is being handled.
        problems: what a person has to mend.

    Returns:
        Whether there is a launcher that looks for it.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    now = time.time()
    extra = {
        "py_callstack": "".join(traceback.format_exception(error)),
        "timestamp": str(int(now)),
        "seconds": now,
        "problems": list(problems),
    }
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
    Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    return True


# ---- in a launcher -------------------------------------------------------------------------------


class Deaths:
    """When each child of this process has ended, as the kernel tells.

    Args:
        expected: children to wait for; watching begins when so many are there.
    """

    def __init__(self, expected: int):
        self._expected = expected
        self._seconds: dict[int, float] = {}
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def seconds(self, pid: int) -> float | None:
        """Since 1970; None when it has not been seen."""
        return self._seconds.get(pid)

    @property
    def all_ended(self) -> bool:
        """Whether none of them is left."""
        return self._over.is_set()

    def _watch(self) -> None:
        this = psutil.Process()
        while len(children := this.children()) < self._expected:
            time.sleep(0.05)
        poll, pids = select.poll(), dict[int, int]()
        for child in children:
            try:
                pids[fd := os.pidfd_open(child.pid)] = child.pid
            except ProcessLookupError:
                continue
            poll.register(fd, select.POLLIN)
        while pids:
            for fd, _ in poll.poll():
                self._seconds[pids.pop(fd)] = time.time()
                poll.unregister(fd)
                os.close(fd)
        self._over.set()


def failure_of(
    *, rank: int, node: int, host: str, pid: int, code: int, died: float, ahead: float, err: Path
) -> RankFailure:
    """What a rank has left.

    Args:
        rank: its number.
        node: its node's.
        host: that node's name.
        pid: of its process.
        code: its exit code; minus the signal that ended it.
        died: when, since 1970.
        ahead: seconds by which this node's clock is ahead of the first node's.
        err: its standard error; the .json beside it holds its exception.
    """
    from gdpo_megatron.nodes.logs import last_lines

    died -= ahead
    failure = RankFailure(
        rank=rank,
        node=node,
        host=host,
        pid=pid,
        code=code,
        died=died,
        seconds=died,
        file=str(err),
    )
    try:
        text = err.with_suffix(".json").read_text(encoding="utf-8")
        message = json.loads(text)["message"]
        extra = message["extraInfo"]
        stack = str(extra["py_callstack"])
    except (OSError, ValueError, KeyError, TypeError):
        return replace(failure, lines=last_lines(err, _LAST_LINES))
    with err.open("a", encoding="utf-8") as file:  # so that one file holds it all
        file.write(f"{stack}\n")
    problems = extra["problems"]
    # Its launcher may end it while it leaves, for a peer that said the same and was faster.
    was_sent = -code in _SENT
    return replace(
        failure,
        code=SAID if problems and was_sent else code,
        seconds=float(extra["seconds"]) - ahead,
        lines=[line for line in stack.splitlines() if line.strip()][-_LAST_LINES:],
        problems=problems,
        recorded=True,
    )


def by_cause(failures: Iterable[RankFailure]) -> list[RankFailure]:
    """Failures with the one that the others follow from at the head.

    A rank that was ended by a signal without a word counts as ended by its launcher, and comes
    last, unless it was the first to be gone.
    """
    all_of_them = list(failures)
    first_gone = min((it.died for it in all_of_them), default=0.0)

    def order(failure: RankFailure) -> tuple[bool, bool, float]:
        sent = not failure.recorded and -failure.code in _SENT and failure.died > first_gone
        return sent, failure.lost_a_peer, failure.seconds

    return sorted(all_of_them, key=order)


def report_lines(reports: Sequence[NodeReport | None], this: int) -> list[str]:
    """What a launcher says at the end: the first failing rank first, the others in a line each.

    Args:
        reports: by node; None of one that has told nothing.
        this: this node's number.
    """
    failures = by_cause(it for report in reports if report for it in report.failures)
    reasons = [(node, it.reason) for node, it in enumerate(reports) if it and it.reason]
    reasons.sort(key=lambda it: it[0] != this)
    lines: list[str] = []
    rest = failures
    if reasons:
        node, reason = reasons[0]
        lines.append(reason if node == this else f"node {node} has ended: {reason}")
    # Beside a node that is gone, errors that speak of a lost peer follow from that.
    if failures and not (reasons and failures[0].lost_a_peer):
        first, rest = failures[0], failures[1:]
        when = time.strftime("%H:%M:%S", time.gmtime(first.seconds))
        lines.append(
            f"the first to fail was rank {first.rank} on node {first.node} ({first.host}, pid: "
            f"{first.pid}), at {when}.{int(first.seconds % 1 * 1000):03d} UTC: {first.ended_by}"
        )
        lines += [f"  {line}" for line in first.lines]
        lines.append(f"  all of it: {first.file}")
    for it in rest[:8]:
        lines.append(f"after it, rank {it.rank} on node {it.node}: {it.what}  ({it.file})")
    if len(rest) > 8:
        lines.append(f"and {len(rest) - 8} more")
    return lines
