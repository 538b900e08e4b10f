"""Which versions of Megatron-Core this package runs on: one table, looked up without importing it.

Everything that depends on the version is data elsewhere: patches and stand-ins with the versions
that need them (megatron_cpu.py), config fields that a version does not have
(policy/megatron_api.py). What ran on which version is in docs/versions.md.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from gdpo_megatron.errors import InputError

Version = tuple[int, int, int]


@dataclass(frozen=True)
class Release:
    """A range of versions with one API.

    Args:
        first: version of the range.
        before: version after its end.
        tested: the one that the tests run on.
        install: how it gets into an environment.
    """

    first: Version
    before: Version
    tested: str
    install: str

    def __contains__(self, version: Version) -> bool:
        return self.first <= version < self.before

    def __str__(self) -> str:
        return f"{shown(self.first)} up to, not including, {shown(self.before)}"


SUPPORTED = (
    Release((0, 16, 1), (0, 17, 0), "0.16.1", "pip install megatron-core==0.16.1"),
    # It declares Python 3.12; its wheels for 3.11 are what the tests run on.
    Release(
        (0, 19, 2),
        (0, 20, 0),
        "0.19.2",
        "pip install --no-deps --ignore-requires-python megatron-core==0.19.2",
    ),
)


def shown(version: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


@functools.cache
def megatron_version() -> Version:
    """Version of the megatron.core that an import would find.

    Read from its source: a copy on the path need not be an installed distribution, and an import
    would come too early for megatron_cpu.py.

    Raises:
        InputError: there is none, or one that SUPPORTED does not have.
    """
    choices = "; ".join(f"{it} ({it.install})" for it in SUPPORTED)
    folder = _find()
    if folder is None:
        raise InputError(f"megatron-core is not installed; choices: {choices}")
    version = _read(folder / "package_info.py")
    if version is None:
        raise InputError(f"{folder}: no version of megatron-core can be read; choices: {choices}")
    if not any(version in it for it in SUPPORTED):
        raise InputError(
            f"megatron-core {shown(version)} ({folder}) is not supported; choices: {choices}"
        )
    return version


def _find() -> Path | None:
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:  # not even a folder `megatron`
        return None
    places = None if spec is None else spec.submodule_search_locations
    return Path(places[0]) if places else None


def _read(path: Path) -> Version | None:
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError):
        return None
    numbers = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, int)
    }
    match numbers:
        case {"MAJOR": major, "MINOR": minor, "PATCH": patch}:
            return major, minor, patch
        case _:
            return None
