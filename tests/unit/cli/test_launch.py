"""How ranks are started and ended: the torchrun command, its environment, signals, exit codes.

A script stands for torchrun, and its children for the workers, each in a session of its own as
torchrun's are. The real ones: tests/e2e.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gdpo_megatron import launch
from gdpo_megatron.launch import LaunchOptions, environment, run, torchrun_command
from gdpo_megatron.platform.network import Way, way_to

SECONDS = 240  # until a process that should be there, or gone, is given up


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ---- command and environment ---------------------------------------------------------------------


def test_one_node_finds_its_own_port():
    command = torchrun_command(LaunchOptions(nproc=4), ["train", "c.yaml", "--seed", "3"])
    assert command == [
        *(sys.executable, "-m", "gdpo_megatron.agent", "--nproc-per-node=4", "--nnodes=1"),
        *("--standalone", "-m", "gdpo_megatron.worker", "train", "c.yaml", "--seed", "3"),
    ]


def test_nodes_with_a_number_get_the_ranks_of_their_place():
    options = LaunchOptions(nproc=8, nnodes=2, node_rank=1, rdzv_endpoint="node0:29500")
    assert options.world_size == 16
    assert torchrun_command(options, ["sft", "c.yaml"]) == [
        *(sys.executable, "-m", "gdpo_megatron.agent", "--nproc-per-node=8", "--nnodes=2"),
        *("--rdzv-backend=static", "--rdzv-endpoint=node0:29500", "--node-rank=1"),
        *("-m", "gdpo_megatron.worker", "sft", "c.yaml"),
    ]
    first = LaunchOptions(nnodes=2, node_rank=0, rdzv_endpoint="a:1")
    assert "--node-rank=0" in torchrun_command(first, [])


def test_nodes_without_a_number_get_ranks_as_they_come():
    options = LaunchOptions(nnodes=2, rdzv_endpoint="node0:29500")
    assert torchrun_command(options, ["sft", "c.yaml"]) == [
        *(sys.executable, "-m", "gdpo_megatron.agent", "--nproc-per-node=1", "--nnodes=2"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=node0:29500", "--rdzv-id=gdpo-node0:29500"),
        "--rdzv-conf=join_timeout=900,read_timeout=900",
        *("-m", "gdpo_megatron.worker", "sft", "c.yaml"),
    ]
    # What this node is called by others, and whether it is where they meet, as its network says.
    there = torchrun_command(options, [], Way("10.0.0.1", "eth0", is_there=True))
    assert "--local-addr=10.0.0.1" in there
    assert "--rdzv-conf=join_timeout=900,read_timeout=900,is_host=true" in there
    elsewhere = torchrun_command(options, [], Way("10.0.0.2", "eth0", is_there=False))
    assert "--local-addr=10.0.0.2" in elsewhere
    assert "--rdzv-conf=join_timeout=900,read_timeout=900,is_host=false" in elsewhere
    unknown = torchrun_command(options, [], Way("127.0.0.1", "lo", is_there=None))
    assert not any("is_host" in it for it in unknown)


def test_what_the_user_set_stays_in_the_environment():
    fresh = environment({"HOME": "/somewhere"})
    assert fresh["HOME"] == "/somewhere" and fresh["TOKENIZERS_PARALLELISM"] == "false"
    assert fresh["OMP_NUM_THREADS"] == "1"
    given = {"OMP_NUM_THREADS": "7", "TOKENIZERS_PARALLELISM": "true"}
    assert environment(given).items() >= given.items()
    way = Way("10.0.0.2", "eth7", is_there=False)
    assert environment({}, way)["GLOO_SOCKET_IFNAME"] == "eth7"
    assert environment({"GLOO_SOCKET_IFNAME": "ib0"}, way)["GLOO_SOCKET_IFNAME"] == "ib0"


def test_the_way_to_a_node_is_the_kernels():
    way = way_to("127.0.0.1:29500")
    assert way is not None
    # Each machine is the loopback's other end: that says nothing about where the nodes meet.
    assert (way.address, way.is_there) == ("127.0.0.1", None)
    assert "127.0.0.1" in {it.address for it in psutil.net_if_addrs()[way.interface]}
    assert way_to("no.such.host.invalid:29500") is None
    assert way_to("127.0.0.1:port") is None


# ---- ending --------------------------------------------------------------------------------------

WORKER = """
import signal, sys, time
from pathlib import Path
from gdpo_megatron.processes import die_with_parent
here, name = Path(sys.argv[1]), sys.argv[2]
die_with_parent(signal.SIGKILL)
(here / f"{name}.started").touch()
while (here / "imports").exists():
    time.sleep(0.02)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(here / f"{name}.listens").touch()
while not told or (here / "stuck").exists():
    time.sleep(0.02)
time.sleep(0.6)  # saving, with time for being told twice
(here / f"{name}.saved").write_text(str(len(told)))
"""

TORCHRUN = """
import subprocess, sys
here = sys.argv[1]
workers = [
    subprocess.Popen(
        [sys.executable, f"{here}/worker.py", here, str(i)], start_new_session=True
    )
    for i in range(2)
]
sys.exit(max(worker.wait() for worker in workers))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a stand-in for torchrun and its two workers leave traces."""
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "torchrun.py").write_text(TORCHRUN)

    def command(options: LaunchOptions, worker: list[str], way: object) -> list[str]:
        return [sys.executable, str(tmp_path / "torchrun.py"), str(tmp_path), *worker]

    monkeypatch.setattr(launch, "torchrun_command", command)
    return tmp_path


def run_with(script: Callable[[], None]) -> int:
    """`run`, while another thread plays what happens meanwhile."""
    errors: list[BaseException] = []

    def play() -> None:
        try:
            script()
        except BaseException as error:
            errors.append(error)
            for child in having("torchrun.py") + having("worker.py"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

    thread = threading.Thread(target=play)
    thread.start()
    code = run(LaunchOptions(), [], unit="step")
    thread.join()
    if errors:
        raise errors[0]
    return code


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def all_exist(folder: Path, suffix: str) -> bool:
    return all((folder / f"{i}.{suffix}").exists() for i in range(2))


def having(text: str) -> list[psutil.Process]:
    """The processes below this one that have a text in their command."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie's error is one of these
            if any(text in argument for argument in process.cmdline()):
                found.append(process)
    return found


def family(stand_in: Path) -> list[psutil.Process]:
    """The stand-ins; other tests may have left processes of the session running."""
    return having(str(stand_in))


def is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(processes: list[psutil.Process]) -> None:
    assert len(processes) == 3
    wait_until(lambda: not any(map(is_there, processes)))


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_is_that_of_the_ranks(monkeypatch: pytest.MonkeyPatch, code: int):
    command = [sys.executable, "-c", f"raise SystemExit({code})"]
    monkeypatch.setattr(launch, "torchrun_command", lambda options, worker, way: command)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run(LaunchOptions(), [], unit="step") == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_ended_by_a_signal_is_told_as_a_shell_does(monkeypatch: pytest.MonkeyPatch):
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(launch, "torchrun_command", lambda options, worker, way: command)
    assert run(LaunchOptions(), [], unit="step") == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_tells_each_worker_once(
    stand_in: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
):
    def script() -> None:
        wait_until(lambda: all_exist(stand_in, "listens"))
        os.kill(os.getpid(), number)

    assert run_with(script) == 130
    assert [(stand_in / f"{i}.saved").read_text() for i in range(2)] == ["1", "1"]
    assert "finishing the step and saving" in capfd.readouterr().err


def test_an_interrupt_while_workers_import_waits_until_they_listen(stand_in: Path):
    (stand_in / "imports").touch()

    def script() -> None:
        wait_until(lambda: all_exist(stand_in, "started"))
        interrupt()
        time.sleep(1)  # a few looks of the launcher: one that told them now would end them
        (stand_in / "imports").unlink()

    assert run_with(script) == 130
    assert [(stand_in / f"{i}.saved").read_text() for i in range(2)] == ["1", "1"]


def test_an_interrupt_before_there_are_workers_is_not_lost(stand_in: Path):
    def script() -> None:
        wait_until(lambda: bool(family(stand_in)))
        time.sleep(0.05)
        interrupt()

    assert run_with(script) == 130
    assert all_exist(stand_in, "saved")


def test_a_second_interrupt_ends_everything_that_was_started(stand_in: Path):
    (stand_in / "stuck").touch()
    started: list[psutil.Process] = []

    def script() -> None:
        wait_until(lambda: all_exist(stand_in, "listens"))
        started.extend(family(stand_in))
        interrupt()
        time.sleep(0.5)
        assert all(map(is_there, started))
        interrupt()
        assert_gone(started)

    assert run_with(script) == 130
    assert not all_exist(stand_in, "saved")


def test_workers_do_not_outlive_a_killed_torchrun(stand_in: Path):
    started: list[psutil.Process] = []

    def script() -> None:
        wait_until(lambda: all_exist(stand_in, "listens"))
        started.extend(family(stand_in))
        (torchrun,) = having(str(stand_in / "torchrun.py"))
        torchrun.kill()

    assert run_with(script) == 137
    assert_gone(started)


def test_nothing_outlives_a_killed_launcher(stand_in: Path):
    """The launcher is a process of its own here, since it is what is killed."""
    launcher = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from gdpo_megatron import launch
torchrun = [sys.executable, {str(stand_in / "torchrun.py")!r}, {str(stand_in)!r}]
launch.torchrun_command = lambda options, worker, way: torchrun
launch.run(launch.LaunchOptions(), [], unit="step")
"""
    with subprocess.Popen([sys.executable, "-c", launcher]) as process:
        wait_until(lambda: all_exist(stand_in, "listens"))
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    try:
        assert_gone(started)
    finally:
        for it in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                it.kill()
