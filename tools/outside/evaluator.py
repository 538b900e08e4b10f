"""What both evaluators need: the served model, their environment, an output folder, a summary.

An evaluator runs as a process of its own, in its own environment, with the token as a variable, no
way to the model hub unless that is asked for, and a home folder inside the output folder, so that
it leaves nothing elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gdpo_megatron.errors import InputError
from outside.endpoint import TOKEN_VARIABLE, Endpoint, NoAnswer, read_token

REPO = Path(__file__).parents[2]
SERVE = "tools/serve_hf_export.sh"

PROBE_TASK = "import importlib.metadata, json, platform, sys; print(json.dumps({'python': "
PROBE_TASK += "platform.python_version()} | {it: importlib.metadata.version(it) for it in "
PROBE_TASK += "sys.argv[1:]}))"


class EvaluatorFailed(Exception):
    """The evaluator itself did not get to its end, or some of its figures are none."""


@dataclass(frozen=True)
class Environment:
    """The environment of an evaluator, as scripts/setup.sh makes it.

    Args:
        mode: of setup.sh, and what follows `-` in the folder's name.
        packages: whose versions the summary names; the first one is the evaluator.
    """

    mode: str
    packages: tuple[str, ...]

    def python(self) -> Path:
        """Its interpreter.

        Raises:
            InputError: it was not made, or only half.
        """
        first = Path(os.environ.get("GDPO_VENV") or REPO / ".venv").absolute()
        folder = first.with_name(f"{first.name}-{self.mode}")
        if not (folder / ".gdpo-ready").is_file():
            raise InputError(
                f"no environment {folder}; scripts/setup.sh {self.mode} makes it (another place: "
                "GDPO_VENV)"
            )
        return folder / "bin" / "python"

    def versions(self) -> dict[str, str]:
        """Of Python and the packages."""
        command = [str(self.python()), "-I", "-c", PROBE_TASK, *self.packages]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


@dataclass
class Summary:
    """What summary.json holds; docs/outside_evaluation.md describes it."""

    evaluator: dict[str, str]
    model: dict[str, Any]
    settings: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int | None] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of both evaluators."""
    parser.add_argument("--output", type=Path, required=True, help="folder to make for the results")
    parser.add_argument("--url", help="of the server, with /v1 (default: $GDPO_SERVED_URL)")
    parser.add_argument("--model", help="its name there (default: $GDPO_SERVED_MODEL)")
    parser.add_argument(
        "--export",
        type=Path,
        help="folder that is served, for its tokenizer (default: $GDPO_SERVED_EXPORT)",
    )
    parser.add_argument(
        "--token-file", type=Path, help=f"file with the token (default: ${TOKEN_VARIABLE})"
    )
    parser.add_argument(
        "--limit", type=int, help="take only so many samples of each task; for a first try"
    )
    parser.add_argument(
        "--concurrency", type=int, default=8, help="requests at a time (default: 8)"
    )


def check_options(options: argparse.Namespace) -> None:
    """Fill in what $GDPO_SERVED_... say, and look at the numbers.

    Raises:
        InputError: with all problems.
    """
    problems = []
    for name in ("url", "model", "export"):
        variable = f"GDPO_SERVED_{name.upper()}"
        if getattr(options, name) is None:
            found = os.environ.get(variable)
            if not found:
                problems.append(
                    f"neither --{name} nor {variable} is given; {SERVE} EXPORT_FOLDER -- COMMAND "
                    "sets it for the command"
                )
            else:
                setattr(options, name, Path(found) if name == "export" else found)
    for name in ("limit", "concurrency"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be 1 or more")
    if options.export is not None and not (options.export / "config.json").is_file():
        problems.append(f"--export {options.export}: no model folder, for it has no config.json")
    if options.url is not None and not options.url.rstrip("/").endswith("/v1"):
        problems.append(f"--url {options.url}: must end with /v1, as in http://127.0.0.1:8000/v1")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        problems.append(f"--output {options.output}: exists and is not empty; name another folder")
    if problems:
        raise InputError(problems)


def connect(options: argparse.Namespace) -> tuple[Endpoint, int]:
    """The server, and the tokens of prompt and completion together that it takes.

    Raises:
        InputError: it is not there, or not as the options say.
    """
    token = read_token(options.token_file)
    if token is None:
        raise InputError(f"no token: give --token-file, or set {TOKEN_VARIABLE}")
    endpoint = Endpoint(options.url.rstrip("/"), options.model, token)
    try:
        return endpoint, endpoint.context_length()
    except NoAnswer as error:
        fix = f"is it running? {SERVE} {options.export} starts it"
        if error.status == 401:
            fix = "the token is not the one that it was started with"
        raise InputError(f"--url {endpoint.url}: {error}; {fix}") from error


def variables(endpoint: Endpoint, work: Path, *, online: bool = False) -> dict[str, str]:
    """Environment of an evaluator's process; all that libraries write goes under `work`."""
    home = work / "home"
    (work / "tmp").mkdir(parents=True)
    home.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_", "PYTHON")) and name != TOKEN_VARIABLE
    }
    own = {
        "HOME": home,
        "XDG_CACHE_HOME": home / "cache",
        "HF_HOME": home / "hf",
        "TMPDIR": work / "tmp",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # The names under which lm-eval and bfcl-eval look for the server's token.
        "OPENAI_API_KEY": endpoint.token,
        "REMOTE_OPENAI_API_KEY": endpoint.token,
    }
    if not online:
        own |= {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
        own["TRANSFORMERS_OFFLINE"] = "1"
    for name in ("NO_PROXY", "no_proxy"):
        own[name] = ",".join(filter(None, ("127.0.0.1,localhost", os.environ.get(name))))
    return kept | {name: str(value) for name, value in own.items()}


def run_logged(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Run a command with its output in a log.

    Raises:
        EvaluatorFailed: with the last line of it.
    """
    print(f"running {Path(command[0]).parent.parent.name}; its output: {log}", flush=True)
    with log.open("ab") as file:
        ended = subprocess.run(
            command,
            env=dict(environment),
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if ended.returncode:
        lines = [it.strip() for it in log.read_text(errors="replace").splitlines() if it.strip()]
        last = lines[-1][:300] if lines else "no output"
        raise EvaluatorFailed(f"it ended with status {ended.returncode}: {last}; log: {log}")


def file_facts(path: Path) -> dict[str, Any]:
    """Which file it was, for the summary."""
    content = path.read_bytes()
    return {"file": str(path), "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def model_facts(options: argparse.Namespace, endpoint: Endpoint, context: int) -> dict[str, Any]:
    """Which model it was, for the summary."""
    return {
        "name": endpoint.model,
        "url": endpoint.url,
        "export": str(options.export),
        "context_length": context,
    }


def finish(summary: Summary, output: Path, work: Path, started: float) -> None:
    """Delete the scratch files, write summary.json and show its figures."""
    shutil.rmtree(work, ignore_errors=True)
    summary.seconds = round(time.monotonic() - started, 1)
    summary.files = sorted(str(it.relative_to(output)) for it in output.rglob("*") if it.is_file())
    (output / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    evaluator = summary.evaluator
    print(f"{evaluator['name']} {evaluator['version']}, {summary.model['name']}:")
    for it in summary.results:
        stderr = "" if it.get("stderr") is None else f" +- {it['stderr']:.4f}"
        print(f"  {it['task']}, {it['metric']}: {it['value']:.4f}{stderr} ({it['num_samples']})")
    print("  " + ", ".join(f"{name}: {value}" for name, value in summary.counts.items()))
    print(f"  {output / 'summary.json'}, after {summary.seconds} s", flush=True)


def be_program(
    description: str,
    add: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace, Path], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse, run, and say in one line what went wrong.

    Args:
        description: for --help.
        add: more options.
        run: gets the options and a folder for scratch files, deleted afterwards.
        arguments: default: the program's own.

    Returns:
        The exit code: 2 for what the user can put right, 1 when the evaluation failed.
    """
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    add(parser)
    options = parser.parse_args(arguments)
    code, problems, work = 2, [], options.output / "work"
    try:
        check_options(options)
        options.output = options.output.absolute()
        work = options.output / "work"
        run(options, work)
        return 0
    except InputError as error:
        problems = error.problems
    except EvaluatorFailed as error:
        code, problems = 1, [str(error)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for problem in problems:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
    return code
