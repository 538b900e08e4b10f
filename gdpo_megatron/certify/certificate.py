"""The certificate: what was checked where, with every number and its bound, as JSON and as text.

It is made to be shown: it names no host, no user and no path, unless the reason of a failure does.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdpo_megatron import __version__
from gdpo_megatron.certify.check import Measured, Outcome, Situation, Status
from gdpo_megatron.errors import InputError

SCHEMA_VERSION = 1

_PACKAGE = Path(__file__).resolve().parents[1]


def make_certificate(situation: Situation, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All of it, ready for JSON."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "schema_version": SCHEMA_VERSION,
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "project": {"version": __version__, **_commit()},
        "num_devices": situation.num_devices,
        "machine": describe_machine(situation),
        "counts": count(outcomes),
        "checks": [
            {**asdict(it), "measured": [_number(x) for x in it.measured]} for it in outcomes
        ],
    }


def count(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many ended in which way."""
    return {status.value: sum(it.status is status for it in outcomes) for status in Status}


def _number(measured: Measured) -> dict[str, Any]:
    value: Any = measured.value  # JSON has no word for what is no number
    if not math.isfinite(measured.value):
        value = str(measured.value)
    return {**asdict(measured), "value": value, "good": measured.good}


def describe_machine(situation: Situation) -> dict[str, Any]:
    """Hardware and versions."""
    import psutil

    from gdpo_megatron.platform import machine

    facts = machine.gather()
    return {
        "platform": situation.platform.name,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [
            {
                "name": it.name,
                "capability": ".".join(map(str, it.capability)),
                "memory_gib": round(it.memory / 2**30, 1),
            }
            for it in facts.gpus
        ],
        "driver": facts.driver,
        "toolkit": facts.toolkit,
        "collectives": facts.collectives,
        "python": facts.python,
        "packages": {**dict(sorted(facts.packages.items())), "torch": facts.torch},
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else "unknown"


def _commit() -> dict[str, Any]:
    """Of the checkout that this package is in; nulls where it is in none."""
    found = {"commit": None, "modified": None}
    if not (_PACKAGE.parent / ".git").exists():
        return found
    answers: list[str] = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", _PACKAGE.name]):
        command = ["git", "-C", str(_PACKAGE.parent), *words]
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.CalledProcessError):
            return found
        answers.append(ended.stdout.strip())
    return {"commit": answers[0], "modified": bool(answers[1])}


def write_certificate(path: Path, certificate: Mapping[str, Any]) -> None:
    """Write JSON."""
    text = json.dumps(certificate, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_certificate(path: Path) -> dict[str, Any]:
    """Read what `write_certificate` wrote.

    Raises:
        InputError: it is no certificate of this schema.
    """
    try:
        certificate = json.loads(path.read_text(encoding="utf-8"))
        version = certificate["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no certificate: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: has schema_version {version}; this reads {SCHEMA_VERSION}")
    return certificate


# ---- text ----------------------------------------------------------------------------------------


def result_lines(outcome: Outcome) -> Iterator[str]:
    """What is said of a check when it has ended."""
    nearest = outcome.nearest
    said = outcome.reason or (
        f"nearest to its bound: {nearest}" if nearest else "all as it must be"
    )
    yield f"{outcome.status.upper():10}  {outcome.check:18}  {outcome.seconds:6.1f} s  {said}"
    yield from (f"{'':33}note: {note}" for note in outcome.notes)


def summary_lines(certificate: Mapping[str, Any]) -> Iterator[str]:
    """Table and verdict."""
    checks = certificate["checks"]
    yield f"{where(certificate)}:"
    for it in checks:
        numbers = f"{len(it['measured'])} numbers" if it["measured"] else ""
        yield f"  {it['status']:10}  {it['check']:18}  {it['seconds']:6.1f} s  {numbers}".rstrip()
        if it["reason"] is not None:
            yield f"  {'':10}    {it['reason']}"
    counts = certificate["counts"]
    yield (
        f"{counts['pass']} passed, {counts['fail']} failed, {counts['cannot run']} cannot run here"
    )


def where(certificate: Mapping[str, Any]) -> str:
    """The machine in a line."""
    machine, number = certificate["machine"], certificate["num_devices"]
    if machine["gpus"]:
        name = machine["gpus"][0]["name"]
        return f"{number} x {name}, torch {machine['packages']['torch']}"
    plural = "es" if number > 1 else ""
    return (
        f"{number} process{plural} on {machine['cores']} CPU cores, "
        f"torch {machine['packages']['torch']}"
    )
