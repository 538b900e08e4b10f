"""The log folder of a start: <run_dir>/logs/<start>/node<k>/rank<r>.{out,err,json}.

All that a rank and its children write to standard output and error is in its files, and is shown
as it comes, that of ranks other than the first behind the rank's number. On a terminal the first
rank's output stays there, since it draws its progress. The .json file holds the exception that a
rank ended with.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.tail_log import TailLog

from gdpo_megatron.processes import LAUNCHER

FOLDER = "logs"


def name_of_start() -> str:
    """Of the folder: the time in UTC; sorts as the starts do."""
    now = datetime.datetime.now(datetime.UTC)
    return now.strftime("%Y-%m-%dT%H-%M-%S.%f")[:-3]


class RankLogs(LogsSpecs):
    """Where the output of a node's ranks goes, once `folder` is set.

    Args:
        on_terminal: whether the first rank's output stays on the terminal.
    """

    def __init__(self, *, on_terminal: bool):
        super().__init__()
        self.folder: Path | None = None
        self.ranks: list[int] = []
        """By the order of local ranks, once they have been numbered."""
        self._on_terminal = on_terminal
        self._shown: list[TailLog] = []

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def file(self, rank: int, kind: str) -> Path:
        """A file of a rank: `out`, `err` or `json`."""
        assert self.folder is not None
        return self.folder / f"rank{rank}.{kind}"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the files of each rank, and begin to show what comes into them."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks = [int(envs[local]["RANK"]) for local in sorted(envs)]
        out = {local: str(self.file(rank, "out")) for local, rank in enumerate(self.ranks)}
        err = {local: str(self.file(rank, "err")) for local, rank in enumerate(self.ranks)}
        errors = {local: str(self.file(rank, "json")) for local, rank in enumerate(self.ranks)}
        for local, path in errors.items():
            envs[local]["TORCHELASTIC_ERROR_FILE"] = path
            envs[local][LAUNCHER] = str(os.getpid())
        heads = {local: f"[rank {r}] " if r else "" for local, r in enumerate(self.ranks)}
        if self._on_terminal and 0 in self.ranks:
            out[self.ranks.index(0)] = ""  # as it is
        for files, stream in ((out, sys.stdout), (err, sys.stderr)):
            stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
            paths = {local: path for local, path in files.items() if path}
            self._shown.append(TailLog("rank", paths, stream, heads).start())
        return LogsDest(stdouts=out, stderrs=err, error_files=errors)

    def finish(self) -> None:
        """Show what is left; the ranks have ended."""
        for it in self._shown:
            it.stop()
        self._shown.clear()


def last_lines(path: Path, number: int) -> list[str]:
    """The end of a file that may be long or missing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * number))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-number:]
