"""One node's torchrun: `python -m gdpo_megatron.agent OPTIONS -m gdpo_megatron.worker ...`.

It takes torchrun's options and does what torchrun does, and beside that
- compares this node with the others before a rank is started (nodes/health.py),
- keeps what ranks write in the run's log folder (nodes/logs.py),
- ends the ranks when another node is gone (nodes/watch.py),
- says which rank was the first to fail, on whichever node (nodes/failures.py).

Exit codes: 0 done, 2 something that a person has to mend was said, 130 interrupted and saved, 1 a
rank failed or a node is gone, 143 ended by a signal.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.run import config_from_args, parse_args

from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.interrupt import INTERRUPTED
from gdpo_megatron.nodes.failures import (
    SAID,
    Deaths,
    NodeReport,
    RankFailure,
    by_cause,
    failure_of,
    report_lines,
)
from gdpo_megatron.nodes.logs import FOLDER, RankLogs, name_of_start
from gdpo_megatron.nodes.meeting import Meeting, watched, within
from gdpo_megatron.nodes.watch import Watch

_SHARE_SECONDS = 15.0
"""Until a folder that one node has made shows on the others; network file systems keep what they
have read of one for a while."""

_SAVE_SECONDS = 240
"""For ranks to finish their step and save, when this process is told to end: a scheduler tells it
and them at once."""

_TELL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """What the ranks are started for.

    Args:
        job: "train", "sft" or "eval".
        path: of the config.
        config: loaded.
    """

    job: str
    path: Path
    config: RLConfig | SFTConfig

    @classmethod
    def of(cls, arguments: Sequence[str]) -> WorkerJob:
        """From the arguments of gdpo_megatron.worker."""
        job, path, *overrides = arguments
        root = SFTConfig if job == "sft" else RLConfig
        return cls(job, Path(path), load_config(root, Path(path), overrides))

    @property
    def run_dir(self) -> Path:
        """Where the run is."""
        return resolve_path(self.path.resolve().parent, self.config.run_dir)


class NodeAgent:
    """A node's part of a job.

    Args:
        config: torchrun's.
        job: what the ranks are for.
        place: HOST:PORT where nodes meet.
    """

    def __init__(self, config: LaunchConfig, job: WorkerJob, place: str):
        self._job = job
        self._place = place
        self._nproc = config.nproc_per_node
        self._hosts = [socket.gethostname()]
        self._node = 0
        self._ahead = 0.0
        self._logs = RankLogs(on_terminal=sys.stdout.isatty())
        self._watch: Watch | None = None
        self._deaths: Deaths | None = None
        self._facts = ""
        if config.max_nodes > 1 and job.config.launch.health_check:
            from gdpo_megatron.nodes import health

            # Now, and not when the others wait for it.
            self._facts = health.gather(
                job.job, job.path, job.config, nproc=self._nproc, nnodes=config.max_nodes
            ).dump()
        config.logs_specs = self._logs
        config.shutdown_timeout = _SAVE_SECONDS
        config.rdzv_backend = watched(config.rdzv_backend, self._met)
        self._config = config

    def run(self, command: str, arguments: Sequence[str]) -> int:
        """Start the ranks and wait for them.

        Returns:
            Exit code.
        """
        try:
            elastic_launch(self._config, command)(*arguments)
        except ChildFailedError as error:
            return self._failed(error.failures)
        except InputError as error:
            say(error.problems)
            return SAID
        except SignalException as error:
            self._logs.finish()
            return INTERRUPTED if self._interrupted() else 128 + error.sigval
        except (RendezvousError, DistError, OSError) as error:
            self._logs.finish()
            cause = error.__cause__ or error
            say([f"the nodes have not met at {self._place}: {type(cause).__name__}: {cause}"])
            return 1
        self._logs.finish()
        return INTERRUPTED if self._interrupted() else 0

    # ---- the beginning --------------------------------------------------------------------------

    def _met(self, meeting: Meeting) -> None:
        """Before ranks are started; on all nodes together."""
        self._node = meeting.node
        start = meeting.of_first("start", name_of_start)
        folder = self._job.run_dir / FOLDER / start
        self._logs.folder = folder / f"node{meeting.node}"
        self._deaths = Deaths(self._nproc)
        if meeting.num_nodes == 1:
            return
        self._hosts = meeting.gather("host", socket.gethostname())
        if self._facts:
            self._check(meeting, folder)
        self._watch = Watch(
            meeting,
            self._hosts,
            self._place,
            self._job.config.launch.node_timeout_seconds,
            is_over=self._ranks_have_ended,
            give_up=self._give_up,
        )

    def _check(self, meeting: Meeting, folder: Path) -> None:
        from gdpo_megatron.nodes import health

        began = time.monotonic()
        token = meeting.of_first("token", lambda: _leave_token(folder))
        nodes = [health.NodeFacts.load(it) for it in meeting.gather("facts", self._facts)]
        self._ahead, error = meeting.clock_ahead()
        clocks = meeting.gather("clock", f"{self._ahead!r} {error!r}")
        shares = meeting.gather("shares", str(_sees_token(folder, token)))
        found = health.problems(
            nodes,
            [health.Clock(*map(float, it.split())) for it in clocks],
            [it == "True" for it in shares],
        )
        if not found:
            if meeting.node == 0:
                parsed = [health.Clock(*map(float, it.split())) for it in clocks]
                print(health.summary(nodes, parsed, time.monotonic() - began), flush=True)
            return
        # The first node says all of it, each other one what concerns it.
        within(_TELL_SECONDS, lambda: meeting.gather("seen", ""))  # the store leaves with its node
        own = [text for node, text in found if meeting.node in (0, node)]
        raise InputError(own or [f"a node is not as it should be: node 0 ({nodes[0].host}) says"])

    def _ranks_have_ended(self) -> bool:
        return self._deaths is not None and self._deaths.all_ended

    # ---- the end --------------------------------------------------------------------------------

    def _interrupted(self) -> bool:
        """Whether the ranks have saved and left because one was told to."""
        return any(self._logs.file(rank, "interrupted").exists() for rank in self._logs.ranks)

    def _failed(self, failures: dict[int, ProcessFailure]) -> int:
        self._logs.finish()
        if self._watch is not None:
            self._watch.close()
        own = by_cause(self._failure(rank, it) for rank, it in failures.items())
        reason = "" if self._watch is None else self._watch.reason
        if reason:
            own = [it for it in own if it.recorded]  # the others were ended from here
        reports = self._reports(NodeReport(reason=reason, failures=own))
        told = by_cause(it for report in reports if report for it in report.failures)
        if not reason and own[0].code == SAID and told[0].code == SAID:
            first = reports[0]
            elsewhere = first.failures[0].problems if self._node and first else []
            say([it for it in dict.fromkeys(own[0].problems) if it not in elsewhere])
            return SAID
        say(report_lines(reports, self._node))
        return 1

    def _reports(self, own: NodeReport) -> list[NodeReport | None]:
        if self._watch is None:
            return [own]
        return self._watch.exchange(own)

    def _failure(self, rank: int, failure: ProcessFailure) -> RankFailure:
        died = None if self._deaths is None else self._deaths.seconds(failure.pid)
        return failure_of(
            rank=rank,
            node=self._node,
            host=self._hosts[self._node if len(self._hosts) > 1 else 0],
            pid=failure.pid,
            code=failure.exitcode,
            died=failure.timestamp if died is None else died,
            ahead=self._ahead,
            err=self._logs.file(rank, "err"),
        )

    def _give_up(self) -> None:
        """The ranks are gone, but torchrun waits for something over a network that is too."""
        assert self._watch is not None
        say(report_lines(self._watch.exchange(NodeReport(reason=self._watch.reason)), self._node))
        _leave(1)


def _leave_token(folder: Path) -> str:
    """What the first node leaves in the run's folder for the others to find."""
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid4().hex
    (folder / "start").write_text(token, encoding="utf-8")
    return token


def _sees_token(folder: Path, token: str) -> bool:
    end = time.monotonic() + _SHARE_SECONDS
    while True:
        try:
            if (folder / "start").read_text(encoding="utf-8") == token:
                return True
        except OSError:
            pass  # not there, or not yet
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def say(lines: Sequence[str]) -> None:
    """To standard error, as this program."""
    sys.stdout.flush()
    for number, line in enumerate(lines):
        print(line if line[:1] == " " and number else f"gdpo-megatron: {line}", file=sys.stderr)
    sys.stderr.flush()


def _leave(code: int) -> None:
    """End without a look at threads that wait for other nodes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run torchrun with this process's arguments."""
    # It tells of one failed rank of this node, perhaps of one that followed from another's.
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    logger.addFilter(lambda record: not str(record.msg).startswith("failed (exitcode"))
    given = parse_args(sys.argv[1:])
    if given.standalone:  # as torchrun does it
        given.rdzv_backend, given.rdzv_endpoint = "c10d", "localhost:0"
        given.rdzv_id = str(uuid4())
    given.log_dir = os.devnull  # torchrun would make one
    config, command, arguments = config_from_args(given)
    assert isinstance(command, str)
    try:
        agent = NodeAgent(config, WorkerJob.of(given.training_script_args), given.rdzv_endpoint)
    except InputError as error:
        say(error.problems)
        sys.exit(SAID)
    _leave(agent.run(command, arguments))


if __name__ == "__main__":
    main()
