"""Replay what the Dockerfile installs where there is no container engine.

    python tools/replay_dockerfile.py cpu FOLDER
    python tools/replay_dockerfile.py gpu FOLDER --no-compile

FOLDER becomes the image's root for `/opt`: WORKDIR, COPY (through .dockerignore, from this
checkout) and the RUN lines that call scripts/install_image.sh are carried out in order, and at the
end the health check and the entry point, from what was installed. What needs an engine, root or a
compiler for GPUs is skipped and named: base images, the distribution's packages, users, and with
`--no-compile` what is compiled against torch. The host's own interpreter stands in for the image's.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
CALL = re.compile(r"\bbash scripts/install_image\.sh ")


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """(INSTRUCTION, its arguments) without comments, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), " ".join(rest.split())


def last_stage(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of the image itself, from its FROM on."""
    found = list(instructions(dockerfile))
    begin = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[begin:]


def exec_form(arguments: str) -> list[str]:
    """The command of `CMD ["a", "b"]`, whatever options stand before it."""
    return json.loads(arguments[arguments.index("[") :])


def context(repo: Path) -> Iterator[Path]:
    """Files that reach the build, by .dockerignore as it is written here: `*`, `!name`, `**/name`.

    Args:
        repo: the checkout.

    Yields:
        paths relative to it.
    """
    lines = [line.strip() for line in (repo / ".dockerignore").read_text().splitlines()]
    rules = [line for line in lines if line and not line.startswith("#")]
    if rules[0] != "*":
        raise ValueError(".dockerignore must begin with *: it lists what is taken")
    wanted = [rule[1:] for rule in rules if rule.startswith("!")]
    dropped = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    for name in wanted:
        top = repo / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            relative = path.relative_to(repo)
            if path.is_file() and not any(
                fnmatch.fnmatch(part, pattern) for part in relative.parts for pattern in dropped
            ):
                yield relative


class Replay:
    """The state of an image that is being built in a folder."""

    def __init__(self, root: Path, row: str, *, compile_too: bool):
        self.root, self.row, self.compile_too = root, row, compile_too
        self.folder = root
        self.values = {"ROW": row}
        self.health: list[str] = []
        self.entry: list[str] = []
        self.command: list[str] = []

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def step(self, name: str, arguments: str) -> str:
        """Carry out one instruction and return what happened."""
        handler: Any = getattr(self, f"_{name.lower()}", None)
        return handler(arguments) if handler else "skipped: nothing to do without an engine"

    def _workdir(self, arguments: str) -> str:
        if not arguments.startswith("/opt/"):
            return "skipped: outside of /opt"
        self.folder = self.inside(arguments)
        self.folder.mkdir(parents=True, exist_ok=True)
        return "done"

    def _arg(self, arguments: str) -> str:
        name, _, default = arguments.partition("=")
        self.values.setdefault(name, os.environ.get(name, default))
        return f"{name}={self.values[name]}"

    def _copy(self, arguments: str) -> str:
        *sources, target = arguments.split()
        files = list(context(REPO))
        count = 0
        for source in sources:
            matched = [it for it in files if source == "." or fnmatch.fnmatch(str(it), source)]
            if not matched:
                raise SystemExit(f"COPY {source}: .dockerignore leaves none of it")
            for path in matched:
                place = self.folder / (path if source == "." else Path(target) / path.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(REPO / path, place)
                count += 1
        return f"{count} files"

    def _run(self, arguments: str) -> str:
        if not CALL.search(arguments):
            return "skipped: changes the system, which needs root in an image"
        if arguments.endswith(" compiled") and self.row == "gpu" and not self.compile_too:
            return "skipped: --no-compile"
        begun = time.monotonic()
        subprocess.run(
            ["bash", "-c", arguments.replace("/opt/", f"{self.root}/opt/")],
            cwd=self.folder,
            env=os.environ | self.values,
            check=True,
        )
        return f"{time.monotonic() - begun:.0f} s"

    def _healthcheck(self, arguments: str) -> str:
        self.health = exec_form(arguments)
        return "run at the end"

    def _entrypoint(self, arguments: str) -> str:
        self.entry = exec_form(arguments)
        return "run at the end"

    def _cmd(self, arguments: str) -> str:
        self.command = exec_form(arguments)
        return "run at the end"

    def try_out(self, command: list[str]) -> int:
        """Run a command of the image from a folder without the source."""
        print(f"$ {' '.join(command)}", flush=True)
        place = self.root / "workspace"
        place.mkdir(exist_ok=True)
        path = f"{self.inside('/opt/gdpo/bin')}:{os.environ['PATH']}"
        return subprocess.run(command, cwd=place, env=os.environ | {"PATH": path}).returncode


def main() -> int:
    """Replay; 0 where the health check passes, on a row gpu without a GPU where it can run."""
    parser = argparse.ArgumentParser(description="Replay the Dockerfile's install steps.")
    parser.add_argument("row", choices=["cpu", "gpu"])
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--no-compile", action="store_true", help="skip what needs nvcc")
    options = parser.parse_args()
    root = options.folder.resolve()
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        parser.error(f"{root} is not empty")
    replay = Replay(root, options.row, compile_too=not options.no_compile)
    for name, arguments in last_stage((REPO / "Dockerfile").read_text()):
        print(f"{name} {arguments[:90]}", flush=True)
        print(f"    {replay.step(name, arguments)}", flush=True)
    codes = [replay.try_out(replay.health), replay.try_out(replay.entry + replay.command)]
    print(f"health check: exit code {codes[0]}; entry point: exit code {codes[1]}")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
