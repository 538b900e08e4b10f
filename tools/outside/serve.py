"""Starts vLLM's server on a model folder, waits until it answers, and takes it down again.

Run by tools/serve_hf_export.sh in the environment that has vLLM. The server has a session of its
own, so that all its processes get one signal, and gets a signal from the kernel should this process
be killed. Its token reaches it as a variable: arguments can be read by everybody on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

from gdpo_megatron.errors import InputError
from gdpo_megatron.platform.vllm_versions import installed_vllm, vllm_problems
from outside.endpoint import TOKEN_VARIABLE, Endpoint, NoAnswer, read_token

NAME = "serve_hf_export"
SERVER = Path(__file__).with_name("vllm_server.py")
OURS = ("--host", "--port", "--api-key", "--served-model-name", "--model", "--uds")
"""Options of vLLM that are not to be passed on."""

CPU_VARIABLES = {
    # vLLM would bind its threads to all cores, and the evaluator needs some: 10 times slower.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
VARIABLES = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # all that it serves is in the folder
    "TRANSFORMERS_OFFLINE": "1",
}
"""What the user has set wins."""

END_SECONDS = 30.0  # for a server to end by itself
POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Stopped(Exception):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        self.number = number


class ServerFailed(Exception):
    """The server did not start, or did not last."""


@dataclass(frozen=True)
class Server:
    """A server that was started.

    Args:
        process: of the API; its session holds all the others.
        endpoint: where it answers.
        log: what it writes.
    """

    process: subprocess.Popen[bytes]
    endpoint: Endpoint
    log: Path

    def check(self) -> None:
        """Raise `ServerFailed` with its reason when it has ended."""
        status = self.process.poll()
        if status is not None:
            raise ServerFailed(f"the server ended with status {status}: {reason(self.log)}")


def reason(log: Path) -> str:
    """The line of a log that says most about a failure: the first error that is no traceback."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: \S", line)]
    # vLLM wraps the cause in others, and writes it first.
    line = errors[0] if errors else next((it for it in reversed(lines) if it.strip()), "no output")
    line = re.sub(r"^(\([\w ]+pid=\d+\) )?(ERROR \S+ \S+ \[[\w./]+:\d+\] )?", "", line)
    return line.strip()[:300]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options, and `command`: what stands behind `--`."""
    own, command = list(arguments), []
    if "--" in own:
        where = own.index("--")
        own, command = own[:where], own[where + 1 :]
        if not command:
            raise InputError("no command after --; leave -- out to serve until a signal")
    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME}.sh EXPORT_FOLDER [options] [-- COMMAND ...]",
        description="Serve an exported model on 127.0.0.1 by vLLM, until a signal or the end of "
        "COMMAND.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "export", type=Path, metavar="EXPORT_FOLDER", help="model folder, HF format"
    )
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--name", help="of the model in requests (default: the folder's name)")
    parser.add_argument(
        "--token-file",
        type=Path,
        help="file with the token that requests must bear, readable by its owner alone (default: "
        f"the variable {TOKEN_VARIABLE}, else a new token, in a file that is shown)",
    )
    parser.add_argument(
        "--max-model-len", type=int, help="tokens of prompt and completion together"
    )
    parser.add_argument("--dtype", help="default: the one that the folder's config.json names")
    parser.add_argument(
        "--start-seconds", type=float, default=900.0, help="to wait for it (default: 900)"
    )
    parser.add_argument("--log", type=Path, help="for what the server writes (default: temporary)")
    parser.add_argument(
        "--vllm-arg",
        action="append",
        default=[],
        metavar="--OPTION=VALUE",
        help="another option of vLLM's server; may be repeated",
    )
    options = parser.parse_args(own)
    options.command = command
    for given in options.vllm_arg:
        if given.split("=")[0] in OURS:
            raise InputError(f"--vllm-arg {given}: this script sets {given.split('=')[0]} itself")
    if not 0 <= options.port < 2**16:
        raise InputError(f"--port {options.port}: must be from 0 to 65535")
    return options


def check_export(folder: Path) -> dict[str, Any]:
    """The config.json of a folder that can be served.

    Raises:
        InputError: there is something else.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that an export wrote")
    config = folder / "config.json"
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: no config.json with weights (*.safetensors) beside it; `gdpo-megatron "
            "convert` makes such a folder"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(
            f"{folder}: no tokenizer.json or tokenizer.model; copy the model's own there"
        )
    try:
        return json.loads(config.read_text())
    except ValueError as error:
        raise InputError(f"{config}: {error}") from error


def choose_port(port: int) -> int:
    """A port of 127.0.0.1 that nobody listens at.

    vLLM itself would share a port with another server of the same user.
    """
    with socket.socket() as probe:
        # As servers do: else the connections of one that has just ended are in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(
                f"--port {port}: cannot be used ({error.strerror}); take another, or 0 for any"
            ) from error
        return probe.getsockname()[1]


def command_line(options: argparse.Namespace, config: Mapping[str, Any], port: int) -> list[str]:
    """How vLLM is started; without the token."""
    dtype = options.dtype or config.get("dtype") or config.get("torch_dtype") or "auto"
    command = [sys.executable, str(SERVER)]
    command += [
        "--model",
        str(options.export.resolve()),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--served-model-name", options.name, "--dtype", dtype]
    # The folder's own defaults (a temperature, a repetition penalty) would change what an evaluator
    # that does not name them measures.
    command += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    command += ["--middleware", "vllm_guard.TokenEverywhere"]
    if options.max_model_len is not None:
        command += ["--max-model-len", str(options.max_model_len)]
    vllm = installed_vllm()
    if vllm is not None and vllm.for_cpu:
        command.append("--enforce-eager")  # compiling takes longer than a small model's answers
    return command + options.vllm_arg


def die_with_parent() -> None:
    """In the new process: have the kernel end it when this one is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path | None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; all of the session has ended on leaving."""
    with contextlib.ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield process
        finally:
            end_session(process)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ask all processes of the session to end, then make them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + END_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < end:
                process.poll()  # a zombie is one of them until it is waited for
                os.killpg(process.pid, 0)
                time.sleep(POLL_SECONDS)
        if process.poll() is not None and not session_lives(process.pid):
            return


def session_lives(leader: int) -> bool:
    """Whether a process of it is there."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_ready(server: Server, seconds: float) -> int:
    """Wait for the model's first token.

    Returns:
        The tokens that a prompt and its completion may have together.
    """
    end = time.monotonic() + seconds
    while True:
        server.check()
        try:
            context = server.endpoint.context_length()
            break
        except NoAnswer:
            if time.monotonic() > end:
                raise ServerFailed(
                    f"no answer within --start-seconds {seconds:g}; last in its log: "
                    f"{server.log.read_text(errors='replace').strip().splitlines()[-1:]}"
                ) from None
            time.sleep(POLL_SECONDS)
    try:
        # Some models are refused by the first pass only.
        server.endpoint.complete("1", max_tokens=1, seconds=max(1.0, end - time.monotonic()))
    except NoAnswer as error:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(END_SECONDS)
        server.check()
        raise ServerFailed(f"its first answer failed: {error}") from error
    return context


def follow(server: Server, options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run the command, or wait for a signal; the exit code."""
    if not options.command:
        while True:
            server.check()
            time.sleep(POLL_SECONDS)
    with running(options.command, environment, log=None) as process:
        while process.poll() is None:
            server.check()
            time.sleep(POLL_SECONDS)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def on_signal(number: int, _frame: object) -> NoReturn:
    """Leave all contexts; a second signal changes nothing."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def serve(options: argparse.Namespace, folder: Path) -> int:
    """Serve and follow.

    Args:
        options: of `parse`.
        folder: for the log and the token, where no file is named for them.
    """
    config = check_export(options.export)
    problems = vllm_problems()
    if problems:
        raise InputError(problems)
    options.name = options.name or options.export.resolve().name
    token, shown = read_token(options.token_file), ""
    if token is None:
        token, shown = secrets.token_urlsafe(32), f"; its token is in {folder / 'token'}"
        descriptor = os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token + "\n")
    port = choose_port(options.port)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", options.name, token)
    vllm = installed_vllm()
    assert vllm is not None  # else it was a problem
    defaults = VARIABLES | (CPU_VARIABLES if vllm.for_cpu else {})
    environment = defaults | os.environ | {"VLLM_API_KEY": token}
    environment.pop(TOKEN_VARIABLE, None)
    log = options.log or folder / "server.log"
    started = time.monotonic()
    with running(command_line(options, config, port), environment, log) as process:
        server = Server(process, endpoint, log)
        context = wait_until_ready(server, options.start_seconds)
        print(
            f"{NAME}: {options.name} is served at {endpoint.url} by {vllm}, context {context} "
            f"tokens, after {time.monotonic() - started:.0f} s{shown}",
            flush=True,
        )
        return follow(
            server,
            options,
            os.environ
            | {
                "GDPO_SERVED_URL": endpoint.url,
                "GDPO_SERVED_MODEL": options.name,
                "GDPO_SERVED_EXPORT": str(options.export.resolve()),
                TOKEN_VARIABLE: token,
            },
        )


def main(arguments: Sequence[str]) -> int:
    """Be the program; the exit code."""
    failed = True
    options = None
    folder = Path(tempfile.mkdtemp(prefix="gdpo-serve-"))
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, on_signal)
        options = parse(arguments)
        code = serve(options, folder)
        failed = False
        return code
    except InputError as error:
        failed = False
        for problem in error.problems:
            print(f"{NAME}: {problem}", file=sys.stderr)
        return 2
    except ServerFailed as error:
        assert options is not None
        print(f"{NAME}: {error}; log: {options.log or folder / 'server.log'}", file=sys.stderr)
        return 1
    except Stopped as stop:
        failed = False
        return 128 + stop.number if options is not None and options.command else 0
    finally:
        (folder / "token").unlink(missing_ok=True)
        if not failed:  # else somebody wants to read the log
            (folder / "server.log").unlink(missing_ok=True)
            folder.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
