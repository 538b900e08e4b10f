"""Prints what installed packages require, one requirement a line, without torch and its riders.

    python vllm_requirements.py [--alone] PACKAGE

`ALONE` are packages whose own requirements hold some of `LEFT_OUT`. With `--alone` the script
prints those among the requirements, to be installed without theirs. Without, it prints all others
and what the first ones require, which must be installed by then. Run by setup.sh.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
"""torch is there. The default index has CUDA builds of the others; text models do without them."""

ALONE = {"xgrammar"}
"""It asks for triton, which its kernels for GPUs use."""


def required(package: str) -> Iterator[Requirement]:
    """What an installed package requires on this machine, without its extras."""
    for line in importlib.metadata.requires(package) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirement.marker = None
        if canonicalize_name(requirement.name) not in LEFT_OUT:
            yield requirement


def main(package: str, *, alone: bool) -> list[str]:
    """The lines to print."""
    first = [it for it in required(package) if canonicalize_name(it.name) in ALONE]
    if alone:
        return [str(it) for it in first]
    rest = [it for it in required(package) if canonicalize_name(it.name) not in ALONE]
    return [str(it) for it in [*rest, *(it for one in first for it in required(one.name))]]


if __name__ == "__main__":
    *options, package = sys.argv[1:]
    print("\n".join(main(package, alone=options == ["--alone"])))
