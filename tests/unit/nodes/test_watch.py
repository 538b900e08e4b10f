"""Nodes that watch one another over a real store; the nodes are threads and processes of this test.

A launcher that is to end its ranks ends children of its process, so each launcher is a process.
Limits that are meant to be hit are hit because a node has gone silent for good. Not covered: a
network that goes away (tools/two_nodes.py).
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from gdpo_megatron.nodes.meeting import Meeting, within

SECONDS = 240

LAUNCHER = """
import os, subprocess, sys, threading, time
from datetime import timedelta
from torch.distributed import PrefixStore, TCPStore
from gdpo_megatron.nodes.failures import NodeReport, RankFailure
from gdpo_megatron.nodes.meeting import Meeting
from gdpo_megatron.nodes.watch import Watch

node, port, act = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=240))
meeting = Meeting(PrefixStore("job", store), node, 2)
rank = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                        stdin=subprocess.PIPE, start_new_session=True)
seconds = 1.0 if act == "silent" else 1000.0
given_up = threading.Event()
watch = Watch(meeting, ["hosta", "hostb"], "127.0.0.1:1", seconds,
              is_over=lambda: rank.poll() is not None, give_up=given_up.set)
print("met", flush=True)
if act == "silent" and node == 1:
    watch.close()                      # says nothing any more, but does not end
    sys.stdin.read()
    os._exit(0)
if act == "fails" and node == 1:
    failure = RankFailure(rank=1, node=1, host="hostb", pid=5, code=1, died=2.0, seconds=2.0,
                          lines=["ValueError: no row"], file="f", recorded=True)
    watch.exchange(NodeReport(failures=[failure]))
    sys.stdin.read()
    os._exit(0)
code = rank.wait()                     # nothing but the watch ends it
print("rank", code, watch.reason, flush=True)
reports = watch.exchange(NodeReport(reason=watch.reason))
told = reports[1].failures[0].what if reports[1] and reports[1].failures else "nothing"
print("told", told, flush=True)
os._exit(0)
"""


def launchers(act: str) -> tuple[list[subprocess.Popen[str]], TCPStore]:
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=SECONDS))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(node), str(store.port), act],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    return processes, store


def test_a_silent_node_ends_the_ranks_of_the_other():
    (first, second), store = launchers("silent")
    try:
        out, _ = first.communicate(timeout=SECONDS)
        assert second.poll() is None
    finally:
        second.communicate(timeout=SECONDS)
    met, ended, told = out.splitlines()
    assert (met, told) == ("met", "told nothing")
    # On a machine that is busy enough a launcher has not heard of itself either.
    assert ended.startswith("rank -9 ")
    assert "has not been heard of for 1 s (launch.node_timeout_seconds)" in ended
    del store


def test_a_node_that_fails_tells_the_others_what():
    (first, second), store = launchers("fails")
    try:
        out, _ = first.communicate(timeout=SECONDS)
    finally:
        second.communicate(timeout=SECONDS)
    assert out.splitlines() == [
        "met",
        "rank -9 node 1 (hostb) has ended",
        "told ValueError: no row",
    ]
    del store


# ---- talking -------------------------------------------------------------------------------------


def on_each_node(num_nodes: int, what: Callable[[Meeting], object]) -> list[object]:
    """What a function returns on each node, a thread with a connection of its own."""
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=SECONDS))
    through = Meeting(PrefixStore("job", server), 0, num_nodes)
    results: list[object] = [None] * num_nodes

    def run(node: int) -> None:
        results[node] = what(replace(through.beside(), node=node))

    threads = [threading.Thread(target=run, args=(node,)) for node in range(num_nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    return results


def test_nodes_hear_one_another():
    assert on_each_node(3, lambda it: it.gather("name", f"n{it.node}")) == [["n0", "n1", "n2"]] * 3
    assert on_each_node(3, lambda it: it.of_first("start", lambda: f"of {it.node}")) == ["of 0"] * 3


def test_clocks_of_one_machine_agree():
    first, *others = on_each_node(3, Meeting.clock_ahead)
    assert first == (0.0, 0.0)
    for ahead, error in others:  # pyright: ignore[reportGeneralTypeIssues]
        # They are one clock: what is seen of a difference is within the error that is told.
        assert abs(ahead) <= error


def test_a_call_that_does_not_return_is_left():
    assert within(SECONDS, lambda: 3) == 3
    assert within(0.05, threading.Event().wait) is None

    def fails() -> None:
        raise RuntimeError

    assert within(SECONDS, fails) is None
