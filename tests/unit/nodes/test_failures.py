"""Which rank is said to have failed first, and what is said.

Failures are written down by hand; those of real ranks: tests/e2e/test_nodes_and_failures.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from gdpo_megatron.nodes.failures import (
    NodeReport,
    RankFailure,
    by_cause,
    failure_of,
    record,
    report_lines,
)

RESET = "RuntimeError: [tcp/pair.cc:537] Read error [10.0.0.1]:5: Connection reset by peer"


def failure(
    rank: int, *, died: float, raised: float | None = None, line: str = "", code: int = 1
) -> RankFailure:
    return RankFailure(
        rank=rank,
        node=rank // 2,
        host=f"host{rank // 2}",
        pid=100 + rank,
        code=code,
        died=died,
        seconds=died if raised is None else raised,
        lines=[line] if line else [],
        file=f"/logs/rank{rank}.err",
        recorded=raised is not None,
    )


def order(*failures: RankFailure) -> list[int]:
    assert order_of(reversed(failures)) == order_of(failures)
    return order_of(failures)


def order_of(failures: Iterable[RankFailure]) -> list[int]:
    return [it.rank for it in by_cause(failures)]


def test_the_earliest_exception_is_the_first():
    assert order(
        failure(0, raised=10.2, died=11.0, line="KeyError: 'b'"),
        failure(1, raised=10.1, died=11.5, line="KeyError: 'a'"),
    ) == [1, 0]


def test_an_error_about_a_lost_peer_follows_from_one_that_is_not():
    # The peer noticed, and wrote its exception, before the clock of the other node said so.
    assert order(
        failure(0, raised=10.0, died=10.5, line=RESET),
        failure(3, raised=10.3, died=10.6, line="ValueError: no such row"),
    ) == [3, 0]


def test_a_rank_that_was_killed_is_before_the_peers_that_lost_it():
    assert order(
        failure(0, raised=9.9, died=10.5, line=RESET),
        failure(1, died=10.0, code=-9),
        failure(2, raised=9.95, died=10.6, line="Timed out waiting 1800000ms for recv operation"),
    ) == [1, 0, 2]


def test_a_rank_that_its_launcher_has_killed_is_last():
    assert order(
        failure(0, raised=10.0, died=10.2, line=RESET),
        failure(1, died=40.0, code=-9),
        failure(2, died=40.1, code=-15),
    ) == [0, 1, 2]
    # A crash is its own.
    assert order(
        failure(0, raised=10.0, died=10.2, line=RESET), failure(1, died=10.3, code=-11)
    ) == [1, 0]


def test_the_report_begins_with_the_first_and_gives_the_others_a_line_each():
    nodes = [
        NodeReport(failures=[failure(0, raised=10.0, died=10.5, line=RESET)]),
        NodeReport(failures=[failure(3, raised=3723.25, died=3724.0, line="ValueError: no row")]),
    ]
    lines = report_lines([NodeReport.load(it.dump()) for it in nodes], this=0)
    assert lines == [
        "the first to fail was rank 3 on node 1 (host1, pid: 103), at 01:02:03.250 UTC: exit code "
        "1",
        "  ValueError: no row",
        "  all of it: /logs/rank3.err",
        f"after it, rank 0 on node 0: {RESET}  (/logs/rank0.err)",
    ]
    assert report_lines([nodes[0], None], this=0)[0].startswith("the first to fail was rank 0")


def test_a_node_that_is_gone_is_the_reason_of_those_who_lost_it():
    own = NodeReport(
        reason="node 1 (host1) has not been heard of for 10 s",
        failures=[failure(0, raised=10.0, died=10.5, line=RESET)],
    )
    lines = report_lines([own, None, NodeReport(reason="node 0 (host0) has ended")], this=0)
    assert lines == [own.reason, f"after it, rank 0 on node 0: {RESET}  (/logs/rank0.err)"]
    lines = report_lines([own, None, NodeReport(reason="")], this=2)
    assert lines[0] == f"node 0 has ended: {own.reason}"


def test_long_lists_are_cut():
    reports: list[NodeReport | None] = [
        NodeReport(failures=[failure(r, raised=float(r), died=100.0) for r in range(30)])
    ]
    lines = report_lines(reports, this=0)
    assert len([it for it in lines if it.startswith("after it")]) == 8
    assert lines[-1] == "and 21 more"
    few = NodeReport.load((reports[0] or NodeReport()).dump())
    assert [it.rank for it in few.failures] == [0, 1, 2, 3]


# ---- what a rank leaves --------------------------------------------------------------------------


def left(err: Path, ahead: float = 0.0) -> RankFailure:
    return failure_of(rank=5, node=1, host="b", pid=7, code=1, died=1000.0, ahead=ahead, err=err)


def test_an_exception_is_left_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    err = tmp_path / "rank5.err"
    err.write_text("a warning\n")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(err.with_suffix(".json")))
    before = time.time()
    try:
        raise ValueError("no such row")
    except ValueError as error:
        assert record(error, ["mend it"])
    found = left(err, ahead=100.0)
    assert found.recorded and found.problems == ["mend it"]
    assert before - 100 <= found.seconds <= time.time() - 100 and found.died == 900.0
    assert found.what == "ValueError: no such row"
    # One file holds it all.
    text = err.read_text()
    assert text.startswith("a warning\nTraceback") and text.rstrip().endswith(found.what)
    # torchrun reads the file too: in its words.
    message = json.loads(err.with_suffix(".json").read_text())["message"]
    assert message["message"] == "ValueError: no such row"
    assert message["extraInfo"]["timestamp"].isdigit()


@pytest.mark.parametrize(
    ("problems", "code", "counts_as"),
    [(["rows: none"], -15, 2), (["rows: none"], -11, -11), ([], -15, -15), (["rows: none"], 2, 2)],
)
def test_who_has_told_what_to_mend_may_be_ended_while_it_leaves(
    problems: list[str], code: int, counts_as: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    err = tmp_path / "rank5.err"
    err.touch()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(err.with_suffix(".json")))
    assert record(ValueError("rows: none"), problems)
    found = failure_of(rank=5, node=1, host="b", pid=7, code=code, died=9.0, ahead=0.0, err=err)
    assert (found.code, found.problems) == (counts_as, problems)


def test_without_an_exception_the_last_lines_speak(tmp_path: Path):
    err = tmp_path / "rank5.err"
    err.write_text("".join(f"line {n}\n" for n in range(100)))
    found = left(err)
    assert not found.recorded and found.seconds == found.died == 1000.0
    assert found.lines == [f"line {n}" for n in range(85, 100)]
    assert left(tmp_path / "none.err").lines == []
    err.with_suffix(".json").write_text("{half")  # it was killed while it wrote
    assert not left(err).recorded


def test_without_a_launcher_nothing_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not record(ValueError("x"))


CHILDREN = """
import subprocess, sys, threading
from gdpo_megatron.nodes.failures import Deaths
hold = [sys.executable, "-c", "import sys; sys.stdin.read()"]
deaths = Deaths(2)
first, second = (subprocess.Popen(hold, stdin=subprocess.PIPE) for _ in range(2))
def until(condition):
    while not condition():
        threading.Event().wait(0.01)
assert deaths.seconds(first.pid) is None and not deaths.all_ended
second.kill()
until(lambda: deaths.seconds(second.pid))  # before anybody has waited for it
assert not deaths.all_ended
first.communicate()
until(lambda: deaths.all_ended)
assert deaths.seconds(second.pid) <= deaths.seconds(first.pid)
assert second.wait() == -9  # the code is still there for who waits for it
print("seen")
"""


def test_deaths_are_seen_in_their_order():
    """In a process of its own: all its children count."""
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ,
        check=False,
    )
    assert done.stdout == "seen\n", done.stderr
