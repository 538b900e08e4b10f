"""Workers: nothing passes from one run to the next, and nothing is left of them.

Not covered: 10,000 runs in a row (docs/sandbox.md says what was run by hand).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import start
from harness import quick_config

from gdpo_megatron.sandbox import Sandbox, Status, close_shared, configure, shared_sandbox
from gdpo_megatron.sandbox.worker import Worker, WorkerDied

REPO = Path(__file__).parents[2]


def wait_until(condition, seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return reached


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(sandbox: Sandbox) -> set[int]:
    return {worker.pid for worker in sandbox._workers}


# ---- between runs --------------------------------------------------------------------------------

_LEAVE = """
import builtins, json, math, os, random, signal, sys
secret = "token-of-the-first-run"
math.pi = 3
builtins.left = secret
json.left = secret
sys.modules["left"] = math
os.environ["LEFT"] = secret
random.seed(99)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.setrecursionlimit(77777)
kept = [os.dup(0) for _ in range(20)]
print("unfinished line", end="")
os._exit(0)
"""
_LOOK = """
import builtins, gc, json, math, os, random, signal, sys
text = "".join(repr(o)[:2000] for o in gc.get_objects() if isinstance(o, (dict, list, tuple)))
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
print(math.pi == 3, hasattr(builtins, "left"), hasattr(json, "left"), "left" in sys.modules,
      "LEFT" in os.environ, signal.getsignal(signal.SIGTERM) == signal.SIG_IGN,
      sys.getrecursionlimit() == 77777, "-".join(["token", "of", "the", "first", "run"]) in text)
print(sum(map(is_open, range(64))), random.random(), hash("a string"), sorted(os.environ))
"""


def test_nothing_is_left_for_the_next_run(sandbox: Sandbox):
    fresh = sandbox.run(_LOOK)
    assert fresh.stdout.splitlines()[0] == " ".join(["False"] * 8), fresh.stderr
    left = sandbox.run(_LEAVE)
    assert (left.status, left.stdout) == (Status.OK, "")  # os._exit flushes nothing
    assert sandbox.run(_LOOK).stdout == fresh.stdout
    assert len(pids(sandbox)) == 1


def test_workers_agree_on_what_is_random(sandbox: Sandbox):
    """Hash order and random numbers would make a verdict depend on the worker."""
    program = "import random\nprint({'a', 'b', 'c', 'd'}, random.random())"
    with start(sandbox.isolation) as other:
        assert other.run(program).stdout == sandbox.run(program).stdout


# ---- faults of the sandbox -----------------------------------------------------------------------


def test_worker_killed_in_a_run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    """The run is repeated on another worker; the program is not blamed."""
    execute = Worker.execute

    def hang_at_first(self: Worker, request, stdin, limits):
        if self.pid == pid:
            request = {"sources": [["main.py", "import time\ntime.sleep(600)"]]}
        return execute(self, request, stdin, limits)

    with start(sandbox.isolation) as victim, ThreadPoolExecutor(1) as thread:
        (pid,) = pids(victim)
        monkeypatch.setattr(Worker, "execute", hang_at_first)
        run = thread.submit(victim.run, "print('done')")
        assert wait_until(psutil.Process(pid).children)  # the program runs
        os.kill(pid, signal.SIGKILL)
        done = run.result()
        assert (done.status, done.stdout, done.num_attempts) == (Status.OK, "done\n", 2)
        assert pids(victim) != {pid}
        assert victim.num_respawns == 1


def test_fault_that_stays_is_no_verdict(monkeypatch: pytest.MonkeyPatch):
    def die(*arguments):
        raise WorkerDied("gone")

    with start("inner") as sandbox:
        monkeypatch.setattr(Worker, "execute", die)
        monkeypatch.setattr("gdpo_megatron.sandbox.pool.probe", lambda *a, **k: [])
        done = sandbox.run("print(1)")
        assert (done.status, done.detail, done.num_attempts) == (Status.INFRA_ERROR, "gone", 3)
        monkeypatch.undo()
        assert sandbox.run("print(1)").stdout == "1\n"


def test_wall_clock_without_cpu_is_tried_twice(sandbox: Sandbox):
    limits = replace(sandbox.limits, wall_seconds=0.4)
    slept = sandbox.run("import time\ntime.sleep(6000)", limits=limits)
    assert (slept.status, slept.detail, slept.num_attempts) == (Status.TIMEOUT, "wall clock", 2)
    limits = replace(sandbox.limits, cpu_seconds=1)
    burnt = sandbox.run("while True: pass", limits=limits)
    assert (burnt.status, burnt.num_attempts) == (Status.TIMEOUT, 1)


def test_closed_sandbox_ends_its_runs():
    with start("inner") as sandbox, ThreadPoolExecutor(1) as thread:
        run = thread.submit(sandbox.run, "import time\ntime.sleep(500)")
        (pid,) = pids(sandbox)
        assert wait_until(psutil.Process(pid).children)
        sandbox.close()
        assert run.result().status is Status.INFRA_ERROR


# ---- the pool ------------------------------------------------------------------------------------


def test_many_threads_share_few_workers(sandbox: Sandbox):
    with Sandbox(quick_config(sandbox.isolation), num_workers=2) as pool:
        with ThreadPoolExecutor(8) as threads:
            outputs = list(threads.map(lambda n: pool.run(f"print({n} * 2)").stdout, range(40)))
        assert outputs == [f"{2 * n}\n" for n in range(40)]
        assert len(pids(pool)) == 2


def test_workers_are_recycled():
    with start("inner", max_tasks_per_worker=3) as sandbox:
        seen = []
        for number in range(7):
            assert sandbox.run(f"print({number})").stdout == f"{number}\n"
            seen += pids(sandbox)
        assert [len(set(seen[:3])), len(set(seen))] == [1, 3]


def test_sandbox_made_in_a_thread_that_ends():
    """The parent death signal is sent when the thread ends that started the worker."""
    made: list[Sandbox] = []
    thread = threading.Thread(target=lambda: made.append(start("inner")))
    thread.start()
    thread.join()
    time.sleep(0.1)  # for a signal that should not come
    with made[0] as sandbox:
        assert sandbox.run("print(1)").num_attempts == 1


def test_fork_gets_its_own():
    configure(quick_config("inner"))
    try:
        mine = shared_sandbox()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            own = shared_sandbox()
            answer = own is not mine and own.run("print(1)").stdout == "1\n"
            own.close()
            os.write(write, b"1" if answer else b"0")
            os._exit(0)
        assert os.read(read, 1) == b"1"
        os.waitpid(child, 0)
        assert mine.run("print(2)").stdout == "2\n"
        assert shared_sandbox() is mine
    finally:
        close_shared()


# ---- what is left --------------------------------------------------------------------------------


def test_runs_leave_nothing(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # not where other jobs have theirs

    def state() -> tuple:
        me = psutil.Process()
        workers = [psutil.Process(pid) for pid in pids(sandbox)]
        counts = [(p.num_fds(), len(p.children())) for p in (me, *workers)]
        return (*counts, len(list(tmp_path.iterdir())))

    sandbox.run("print(1)")
    before = state()
    for number in range(200):
        sandbox.run("raise SystemExit(1)" if number % 3 else "import os; os.abort()")
    assert state() == before


def test_close_leaves_nothing(sandbox: Sandbox):
    with start(sandbox.isolation) as other:
        started = [psutil.Process(pid) for pid in pids(other)]
        assert all(process.is_running() for process in started)
    assert wait_until(lambda: not any(map(is_alive, started)))


OWNER = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.sandbox import Sandbox
sandbox = Sandbox(SandboxConfig(mode=sys.argv[1], cpu_seconds=5000, wall_seconds=6000))
threads = ThreadPoolExecutor(1)
run = threads.submit(sandbox.run, "while True: pass")
print(*(worker.pid for worker in sandbox._workers), flush=True)
run.result()
"""


def test_dies_with_its_owner(sandbox: Sandbox):
    """Killed without a chance to clean up, as a reward worker that overran is."""
    command = [sys.executable, "-c", OWNER, sandbox.isolation]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        worker = psutil.Process(int(owner.stdout.readline()))
        assert wait_until(worker.children)  # the program runs
        family = [*psutil.Process(owner.pid).children(recursive=True), worker]
        owner.kill()
    assert wait_until(lambda: not any(map(is_alive, family)))


# ---- numpy, unsafe -------------------------------------------------------------------------------


def test_numpy_where_it_is_allowed(sandbox: Sandbox):
    with start(sandbox.isolation, allow_numpy=True) as other:
        done = other.run(
            "import numpy as np\n"
            "a = np.arange(10000.0).reshape(100, 100) + np.eye(100)\n"
            "np.random.default_rng(0).integers(9)\n"
            "print(np.linalg.matrix_rank(a @ a), np.fft.fft(a).shape)"
        )
        assert done.stdout.split()[0] == "100", done.stderr
        assert done.stdout.endswith("(100, 100)\n")
        assert other.run_call("import numpy as np", "(np.float32(2), np.arange(2))").value == (
            2.0,
            [0, 1],
        )
    refused = sandbox.run("import numpy")
    assert refused.status is Status.RUNTIME_ERROR
    assert "ModuleNotFoundError" in refused.stderr


def test_unsafe_says_so(capfd: pytest.CaptureFixture[str]):
    with Sandbox(quick_config("unsafe")) as sandbox:
        assert "sandbox.mode is unsafe" in capfd.readouterr().err
        done = sandbox.run("import os\nprint(os.path.isdir('/proc'))")
        assert (done.stdout, done.isolation) == ("True\n", "unsafe")
        # What it forks is ended with it, and it still has limits.
        limits = replace(sandbox.limits, cpu_seconds=1)
        assert sandbox.run("while True: pass", limits=limits).status is Status.TIMEOUT
        left = sandbox.run("import os, time\nif os.fork() == 0: time.sleep(500)\nprint('x')")
        assert left.stdout == "x\n"
        (worker,) = pids(sandbox)
        assert wait_until(lambda: not psutil.Process(worker).children())
