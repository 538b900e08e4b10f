"""A program cannot decide its own verdict, in any mode.

Expected values are compared outside, so there is nothing to forge; where asserts must run inside,
what merely exits, prints or patches still fails. Not covered, and not prevented: a program that
searches its own memory for the nonce of such a check (docs/sandbox.md).
"""

from __future__ import annotations

import json

import pytest
from harness import quick_config

from gdpo_megatron.rewards.builtin import code
from gdpo_megatron.sandbox import NO_VALUE, Sandbox, Status, close_shared, configure

RIGHT = "def f(x):\n    return x + 1\n"
CHECK = "assert f(1) == 2\nassert f(5) == 6\n"

FORGERIES = {
    "exits before the asserts": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "exits when called": "import os\ndef f(x):\n    os._exit(0)",
    "prints a marker": "print('ok', 'True', 'PASSED', 1)\ndef f(x):\n    return None",
    "writes to the value's descriptor": (
        "import os\nos.write(3, b'true')\nos.write(3, b'[2]')\nos._exit(0)"
    ),
    "equal to everything": (
        "class All:\n"
        "    def __eq__(self, other): return True\n"
        "    __ne__ = lambda self, other: False\n"
        "    __hash__ = lambda self: 1\n"
        "def f(x):\n    return All()"
    ),
    "a number that is equal to everything": (
        "class All(int):\n    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\ndef f(x):\n    return All(99)"
    ),
    "patches the encoder": (
        "import json, builtins\n"
        "json.dumps = lambda *a, **k: 'true'\nbuiltins.repr = lambda value: '2'\n"
        "def f(x):\n    return 99"
    ),
    "kills itself": "import os\ndef f(x):\n    os.kill(os.getpid(), 9)",
    "replaces AssertionError": (
        "import builtins\nclass Fine(Exception):\n    pass\n"
        "builtins.AssertionError = Fine\ndef f(x):\n    return 99"
    ),
    "an exception hook": "import sys\nsys.excepthook = lambda *a: None\ndef f(x):\n    return 99",
    "exits at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    return 99",
    "a float that is none": "def f(x):\n    return float('nan')",
    "no function": "x = 1",
    "hashes without end": "def f(x):\n    return {i * (2**61 - 1) for i in range(3000)}",
    "a giant": "def f(x):\n    return [0] * 10**6",
    "a well": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "a circle": "def f(x):\n    y = []\n    y.append(y)\n    return y",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_value_is_not_the_expected_one(name: str, sandbox: Sandbox):
    done = sandbox.run_call(FORGERIES[name], "f(1)")
    assert done.value is NO_VALUE or done.value != 2
    assert sandbox.run_call(RIGHT, "f(1)").value == 2


# These two make asserts true in the process that runs them: what `verdict_inside` warns of.
_WORK_INSIDE = ("equal to everything", "a number that is equal to everything")


@pytest.mark.parametrize("name", [name for name in FORGERIES if name not in _WORK_INSIDE])
def test_forged_check_does_not_pass(name: str, sandbox: Sandbox):
    assert sandbox.run_check(FORGERIES[name], CHECK).value is not True
    assert sandbox.run_check(RIGHT, CHECK).value is True


@pytest.mark.parametrize("name", _WORK_INSIDE)
def test_equality_beats_a_check_inside(name: str, sandbox: Sandbox):
    """Why verdicts inside are counted and can be refused."""
    assert sandbox.run_check(FORGERIES[name], CHECK).value is True


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_earns_nothing(name: str, sandbox: Sandbox):
    configure(quick_config(sandbox.isolation))
    try:
        tests = json.dumps({"asserts": CHECK.splitlines()})
        assert code.pass_rate(f"```python\n{FORGERIES[name]}\n```", tests) == 0.0
        assert code.pass_rate(f"```python\n{RIGHT}\n```", tests) == 1.0
    finally:
        close_shared()


def test_expected_outputs_do_not_enter(sandbox: Sandbox):
    """A program that prints all it can find in its process finds no expected output."""
    secret = "expected-4815162342"
    search = (
        "import gc, os, sys\n"
        "found = [repr(o)[:5000] for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]\n"
        "frame = sys._getframe()\n"
        "while frame:\n    found.append(repr(frame.f_locals)[:5000])\n    frame = frame.f_back\n"
        "text = ''.join(found)\n"
        "parts = ['expected-48', '15162342']\n"
        "print(input(), ''.join(parts) in text, len(text) > 10000)"
    )
    configure(quick_config(sandbox.isolation))
    try:
        tests = json.dumps({"inputs": ["go"], "outputs": [secret]})
        assert code.pass_rate(f"```python\n{search}\n```", tests) == 0.0
        seen = json.dumps({"inputs": ["go"], "outputs": ["go False True"]})
        assert code.pass_rate(f"```python\n{search}\n```", seen) == 1.0
    finally:
        close_shared()


def test_output_that_looks_like_a_sandbox_fault_is_none(sandbox: Sandbox):
    """Else a program could get itself masked instead of marked wrong."""
    for program in (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'OSError: landlock')\n"
        "    except OSError: pass\nraise SystemExit(99)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    ):
        assert sandbox.run(program).status in (Status.RUNTIME_ERROR, Status.MEMORY)
