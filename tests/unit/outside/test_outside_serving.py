"""serve_hf_export: what it refuses, and that no process, file or token outlives it.

A stub stands in for vLLM. That vLLM itself starts and answers, and ends with its engine and its
workers, is shown by tests/e2e/test_outside_evaluators.py.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO / "tools"))

from outside import serve  # noqa: E402
from outside.endpoint import TOKEN_VARIABLE, Endpoint, NoAnswer, read_token  # noqa: E402
from outside.vllm_guard import TokenEverywhere  # noqa: E402

from gdpo_megatron.errors import InputError  # noqa: E402

TOKEN = "a-token-of-the-tests-0123456789"
SECONDS = 120.0  # until something is given up

# serve.py with the stub for vLLM; what it says of an installed vLLM needs no torch here.
DRIVER = """
import sys, types
for name in ("gdpo_megatron.platform", "gdpo_megatron.platform.vllm_versions"):
    sys.modules[name] = types.ModuleType(name)
class Vllm(types.SimpleNamespace):
    def __str__(self): return "a stub"
sys.modules[name].installed_vllm = lambda: Vllm(for_cpu=True)
sys.modules[name].vllm_problems = lambda: []
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from outside import serve
serve.SERVER, serve.END_SECONDS = Path(sys.argv[2]), 2.0
sys.exit(serve.main(sys.argv[3:]))
"""


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """What looks like a model folder."""
    folder = tmp_path / "an export"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").touch()
    return folder


# ---- what it refuses ----------------------------------------------------------------------------


def test_without_vllm(tmp_path: Path) -> None:
    ended = subprocess.run(
        [str(REPO / "tools/serve_hf_export.sh"), "folder"],
        env={**os.environ, "GDPO_VENV": str(tmp_path / "env")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    assert f"no vLLM in {tmp_path}/env-vllm or {tmp_path}/env; scripts/setup.sh vllm" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--"], "no command after --"),
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--vllm-arg=--host=0.0.0.0"], "this script sets --host itself"),
        (["--vllm-arg=--api-key=x"], "this script sets --api-key itself"),
    ],
)
def test_wrong_options(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        serve.parse(["folder", *arguments])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda it: it.rename(it.with_name("moved")), "no such folder"),
        (lambda it: (it / "config.json").unlink(), "no config.json with weights"),
        (lambda it: (it / "model.safetensors").unlink(), "no config.json with weights"),
        (lambda it: (it / "tokenizer.json").unlink(), "no tokenizer.json or tokenizer.model"),
        (lambda it: (it / "config.json").write_text("{"), "config.json: Expecting"),
    ],
)
def test_what_is_no_export(export: Path, spoil: Callable[[Path], Any], said: str) -> None:
    assert serve.check_export(export) == {"dtype": "bfloat16"}
    spoil(export)
    with pytest.raises(InputError, match=said):
        serve.check_export(export)


def test_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: cannot be used"):
            serve.choose_port(port)
    assert serve.choose_port(0) > 0


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_token(None) == TOKEN
    file = tmp_path / "token"
    file.write_text("another-token-of-the-tests\n")
    file.chmod(0o600)
    assert read_token(file) == "another-token-of-the-tests"  # before the variable
    file.chmod(0o640)
    with pytest.raises(InputError, match="others may read or write it; chmod 600"):
        read_token(file)
    for bad in ("", "too short", "with a space in the middle", "non-ascii-t\u00f6ken-0123456789"):
        monkeypatch.setenv(TOKEN_VARIABLE, bad)
        with pytest.raises(InputError, match="16 or more printable ASCII"):
            read_token(None)
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path / "absent")


def test_how_vllm_is_called(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback alone, the folder's own dtype, none of its sampling defaults, a guard."""
    monkeypatch.setattr(serve, "installed_vllm", lambda: None)
    options = serve.parse([str(export), "--name", "it", "--vllm-arg=--seed=3"])
    command = serve.command_line(options, {"dtype": "bfloat16"}, 8000)
    pairs = dict(itertools.pairwise(command))
    assert pairs["--host"] == "127.0.0.1" and pairs["--dtype"] == "bfloat16"
    assert pairs["--generation-config"] == "vllm" and pairs["--served-model-name"] == "it"
    assert pairs["--middleware"] == "vllm_guard.TokenEverywhere"
    assert command[-1] == "--seed=3" and "--max-model-len" not in command


# ---- the guard ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "header", "allowed"),
    [
        ("http", "/invocations", None, False),
        ("http", "/v1/completions", b"Bearer wrong", False),
        ("http", "/healthy", None, False),
        ("websocket", "/v1/realtime", None, False),
        ("http", "/invocations", f"Bearer {TOKEN}".encode(), True),
        ("websocket", "/v1/realtime", f"Bearer {TOKEN}".encode(), True),
        ("http", "/health", None, True),
        ("lifespan", "", None, True),
    ],
)
def test_guard(
    monkeypatch: pytest.MonkeyPatch, kind: str, path: str, header: bytes | None, allowed: bool
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", TOKEN)
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if header is None else [(b"authorization", header)]
    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(TokenEverywhere(app)(scope, None, send))
    assert bool(reached) == allowed and bool(sent) != allowed
    if sent:
        assert sent[0].get("status", sent[0].get("code")) == {"http": 401, "websocket": 1008}[kind]


# ---- start and end ------------------------------------------------------------------------------


class Started:
    """A serve.py that runs, with a stub in place of vLLM."""

    def __init__(self, folder: Path, export: Path, what: str, *arguments: str):
        self.folder, self.pids = folder, folder / "pids"
        (folder / "tmp").mkdir(exist_ok=True)
        self.out, self.err = folder / "out", folder / "err"
        command = [sys.executable, "-c", DRIVER, str(REPO / "tools")]
        command += [str(REPO / "tests/support/stub_server.py"), str(export), "--port", "0"]
        variables = {"STUB_SERVER": what, "STUB_PIDS": str(self.pids), "TMPDIR": f"{folder}/tmp"}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, *arguments], env=os.environ | variables, stdout=out, stderr=err
            )

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, (self.out.read_text(), self.err.read_text())
            time.sleep(0.02)

    def until_served(self) -> None:
        self.until(lambda: "is served at" in self.out.read_text() or self.process.poll())

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; all that the server started is gone."""
        code = self.process.wait(SECONDS)
        pids = self.pids.read_text() if self.pids.exists() else ""  # it may not have come so far
        for pid in map(int, pids.split()):
            self.until(lambda pid=pid: not alive(pid))
        return code, self.out.read_text(), self.err.read_text()

    def left_behind(self) -> list[str]:
        return [it.name for it in (self.folder / "tmp").rglob("*") if it.is_file()]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


SHOW = "import os, sys; print({k: v for k, v in os.environ.items() if k.startswith('GDPO_SERVE')})"


def test_a_command_finds_the_server_and_gives_the_exit_code(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a child of the server that ignores SIGTERM is gone afterwards."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    command = ["--", sys.executable, "-c", f"{SHOW}; sys.exit(7)"]
    code, out, err = Started(tmp_path, export, "stubborn", *command).end()
    assert (code, err) == (7, "")
    first, shown = out.splitlines()
    assert "an export is served at http://127.0.0.1:" in first and "context 99 tokens" in first
    variables = eval(shown)
    assert variables.pop("GDPO_SERVED_URL") in first
    assert variables == {
        "GDPO_SERVED_MODEL": "an export",
        "GDPO_SERVED_EXPORT": str(export),
        TOKEN_VARIABLE: TOKEN,
    }


def test_serves_until_a_signal(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is made, lies in a file for its owner alone, and in no argument."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    started = Started(tmp_path, export, "ok")
    started.until_served()
    line = started.out.read_text()
    file = Path(line.split("its token is in ")[1].strip())
    assert file.stat().st_mode & 0o777 == 0o600
    token = file.read_text().strip()
    url = next(word for word in line.split() if word.startswith("http"))
    assert Endpoint(url, "an export", token).context_length() == 99
    with pytest.raises(NoAnswer) as caught:
        Endpoint(url, "an export", "b" * 20).context_length()
    assert caught.value.status == 401
    family = [psutil.Process(started.process.pid)]
    family += family[0].children(recursive=True)
    assert len(family) == 2
    assert not any(token in argument for it in family for argument in it.cmdline())
    started.process.send_signal(signal.SIGTERM)
    code, _, err = started.end()
    assert (code, err, started.left_behind()) == (0, "", [])
    assert not file.exists()


def test_a_server_that_refuses(tmp_path: Path, export: Path) -> None:
    started = Started(tmp_path, export, "refuses")
    code, out, err = started.end()
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "the server ended with status 3: ValueError: heads of size 8; log: " in err
    assert started.left_behind() == ["server.log"]
    assert Path(err.split("log: ")[1].strip()).is_file()


def test_a_server_that_does_not_start_in_time(tmp_path: Path, export: Path) -> None:
    started = Started(tmp_path, export, "silent", "--start-seconds", "0.5")
    code, _, err = started.end()
    assert code == 1 and "no answer within --start-seconds 0.5" in err


def test_a_server_that_dies_takes_the_command_along(tmp_path: Path, export: Path) -> None:
    """Its last answer is the command's."""
    ask = "import os, sys; sys.path.insert(0, sys.argv[1]); from outside.endpoint import Endpoint;"
    ask += "it = os.environ; Endpoint(it['GDPO_SERVED_URL'], it['GDPO_SERVED_MODEL'], "
    ask += "it['GDPO_SERVE_TOKEN']).context_length(); import time; time.sleep(600)"
    command = ["--", sys.executable, "-c", ask, str(REPO / "tools")]
    code, _, err = Started(tmp_path, export, "breaks", *command).end()
    assert code == 1 and "the server ended with status 1: RuntimeError: the engine died" in err


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is signalled on Linux alone")
def test_a_kill_leaves_no_server(tmp_path: Path, export: Path) -> None:
    started = Started(tmp_path, export, "ok")
    started.until_served()
    started.process.kill()
    assert started.end()[0] == -signal.SIGKILL
