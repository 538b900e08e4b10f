"""Whether files are of the schema: each row, and that no two have the same id."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gdpo_megatron.data.files import read_file
from gdpo_megatron.data.schema import row_problems

MAX_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was found in a file.

    Args:
        path: the file.
        num_rows: rows, the bad ones included.
        sources: rows by their source; good ones only.
        problems: "file:line: field ...", in order of the file.
    """

    path: Path
    num_rows: int
    sources: dict[str, int]
    problems: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether there are rows, and nothing is wrong with any."""
        return self.num_rows > 0 and not self.problems

    def __str__(self) -> str:
        shown = list(self.problems[:MAX_SHOWN])
        if len(self.problems) > MAX_SHOWN:
            shown.append(f"{self.path}: {len(self.problems) - MAX_SHOWN:,} more problems")
        by_source = ", ".join(f"{name} {count:,}" for name, count in sorted(self.sources.items()))
        verdict = "all as the schema has them" if self.good else f"{len(self.problems):,} problems"
        if not self.num_rows:
            verdict = "no rows"
        return "\n".join([*shown, f"{self.path}: {self.num_rows:,} rows ({by_source}): {verdict}"])


def check_prepared(path: Path) -> CheckReport:
    """Check a file; raises InputError where it cannot be read."""
    problems: list[str] = []
    sources = Counter[str]()
    line_of_id: dict[str, int] = {}
    num_rows = 0
    for raw in read_file(path):
        num_rows += 1
        found = [raw.problem] if raw.row is None else row_problems(raw.row)
        if raw.row is not None and isinstance(raw.row.get("id"), str):
            first = line_of_id.setdefault(raw.row["id"], raw.line)
            if first != raw.line:
                found.append(f"field 'id': '{raw.row['id']}' is that of line {first}")
        problems += [f"{path}:{raw.line}: {problem}" for problem in found]
        if raw.row is not None and not found:
            sources[raw.row["source"]] += 1
    return CheckReport(
        path=path, num_rows=num_rows, sources=dict(sources), problems=tuple(problems)
    )
