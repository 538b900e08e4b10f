"""The table of versions that belong together (pins.toml), and how an environment compares to it.

A row is one set that was resolved together: `cpu`, which the tests run on, and `gpu`. Which row an
environment belongs to is told by its build of torch. Everything here is about facts that the caller
gives; nothing is imported to find them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

_TABLE: Final = Path(__file__).with_name("pins.toml")

OPTIONAL: Final[Mapping[str, str]] = {
    "vllm": "only rollout.engine: vllm needs it",
    "transformer-engine": "layers are Megatron-Core's own without it, slower; FP8 does not need it",
    "transformer-engine-torch": "the part of Transformer Engine that torch loads; compiled against "
    "the installed torch: pip install --no-build-isolation transformer-engine-torch",
}
"""Packages that a run can do without, and what is said where they are missing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One set of versions.

    Args:
        name: `cpu` or `gpu`.
        python: minor version of the interpreter, as in `3.12`.
        base_image: that the Dockerfile begins with.
        platform: for which it is resolved, as uv names it.
        packages: requirements by package, without the name: `==2.13.0`.
        beside: the same, of packages in an environment of their own over this one.
        driver: lowest version of the GPU's driver; None where there is no GPU.
    """

    name: str
    python: str
    base_image: str
    platform: str
    packages: Mapping[str, str]
    beside: Mapping[str, str]
    driver: str | None

    def has(self, package: str, version: str) -> bool:
        """Whether the row has this version; a build's name after the `+` does not count.

        Args:
            package: one of `packages` or `beside`.
            version: as its metadata say.
        """
        wanted = self.packages.get(package) or self.beside[package]
        try:
            release = Version(version.split("+")[0])
        except InvalidVersion:
            return False
        return SpecifierSet(wanted).contains(release, prereleases=True)


def rows() -> Mapping[str, Row]:
    """All rows by name."""
    text = _TABLE.read_text(encoding="utf-8")
    return {
        name: Row(
            name=name,
            python=row["python"],
            base_image=row["base_image"],
            platform=row["platform"],
            packages=row["packages"],
            beside=row.get("beside", {}),
            driver=row.get("driver"),
        )
        for name, row in tomllib.loads(text).items()
    }


def table() -> Iterator[str]:
    """The lines of the table in docs/versions.md, one requirement a line."""
    cpu, gpu = (rows()[name] for name in ("cpu", "gpu"))
    yield "| | `cpu` | `gpu` |"
    yield "|---|---|---|"
    yield f"| Python | {cpu.python} | {gpu.python} |"
    for package in {**cpu.packages, **gpu.packages, **cpu.beside}:
        shown = [
            row.packages.get(package)
            or (f"{row.beside[package]}, beside it" if package in row.beside else "-")
            for row in (cpu, gpu)
        ]
        yield f"| {package} | {shown[0]} | {shown[1]} |"
    yield f"| GPU driver | - | {gpu.driver} or newer |"
    yield f"| base image | `{cpu.base_image}` | `{gpu.base_image}` |"
