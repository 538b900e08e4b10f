"""What README and docs say of the committed certificates, between two marks of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdpo_megatron.certify.certificate import read_certificate, where
from gdpo_megatron.certify.check import Measured, Status
from gdpo_megatron.certify.checks import CHECKS

BEGIN = "<!-- certificates: made by tools/write_docs.py -->"
END = "<!-- end of certificates -->"

COLUMNS = {"CPU": ("cpu", "cpu_vllm"), "GPU": ("gpu",)}
"""Head of a column -> its files in docs/certificates; one that is not there was not executed.

Several are of environments of their own: what cannot run in one may in the next."""

Certificates = Mapping[str, Mapping[str, Any]]


def read_certificates(folder: Path) -> Certificates:
    """Those of COLUMNS that are there, by file name."""
    names = [name for files in COLUMNS.values() for name in files]
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: read_certificate(path) for name, path in paths.items() if path.is_file()}


def fill(page: str, lines: Sequence[str]) -> str:
    """The page with other lines between its marks.

    Raises:
        ValueError: it has not both marks once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs the lines '{BEGIN}' and '{END}', once each")
    head, rest = page.split(BEGIN)
    return "\n".join([f"{head}{BEGIN}", *lines, END]) + rest.split(END)[1]


def summary(certificates: Certificates) -> Iterator[str]:
    """Lines of README's table: a row for each check, a column for each kind of machine."""
    machines = dict.fromkeys(f"{where(it)}, {it['date'][:10]}" for it in certificates.values())
    yield f"`gdpo-megatron certify` ([docs/certify.md](docs/certify.md)): {'; '.join(machines)}."
    yield ""
    yield f"| check | proves | {' | '.join(COLUMNS)} |"
    yield "|---" * (2 + len(COLUMNS)) + "|"
    for check in CHECKS:
        cells = [
            _cell([certificates[name] for name in files if name in certificates], check.name)
            for files in COLUMNS.values()
        ]
        yield f"| `{check.name}` | {check.proves} | {' | '.join(cells)} |"


def _cell(certificates: Sequence[Mapping[str, Any]], check: str) -> str:
    """How a check ended in the first certificate in which it could run."""
    found = [it for each in certificates for it in each["checks"] if it["check"] == check]
    if not found:
        return "not executed"
    ran = [it for it in found if it["status"] != Status.CANNOT_RUN]
    if not ran:
        return Status.CANNOT_RUN
    return f"pass, {ran[0]['seconds']:.0f} s" if ran[0]["status"] == Status.PASS else "FAIL"


def numbers(certificates: Certificates) -> Iterator[str]:
    """Lines of docs/certify.md: of each check the number that comes nearest to its bound."""
    for number, (name, certificate) in enumerate(certificates.items()):
        if number:
            yield ""  # or it would be a row of the table above
        machine, project = certificate["machine"], certificate["project"]
        commit = (project["commit"] or "no checkout")[:12]
        packages = machine["packages"]
        versions = ", ".join(
            f"{it} {packages[it]}"
            for it in ("torch", "megatron-core", "transformers")
            if it in packages
        )
        yield (
            f"`docs/certificates/{name}.json`, {certificate['date']}: {where(certificate)}, "
            f"{machine['processor']}; {versions}; commit {commit}"
            + (", with changes" if project["modified"] else "")
            + "."
        )
        yield ""
        yield "| check | ended | seconds | numbers | nearest to its bound |"
        yield "|---|---|---|---|---|"
        for found in certificate["checks"]:
            said = found["reason"] or _nearest(found)
            said = "; ".join([said, *found["notes"]]) if found["notes"] else said
            yield (
                f"| `{found['check']}` | {found['status']} | {found['seconds']:.0f} "
                f"| {len(found['measured'])} | {said} |"
            )


def _nearest(found: Mapping[str, Any]) -> str:
    upper = [
        Measured(it["name"], float(it["value"]), it["relation"], it["bound"])
        for it in found["measured"]
        if it["relation"] == "<=" and it["bound"] > 0
    ]
    if not upper:
        return "all as it must be"
    nearest = max(upper, key=lambda it: it.value / it.bound)
    return f"{nearest.name}: {nearest.value:.2g} of {nearest.bound:.2g}"
