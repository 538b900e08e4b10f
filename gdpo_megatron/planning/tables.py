"""Plans and dry runs as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gdpo_megatron.planning.job import Job

if TYPE_CHECKING:  # which import Megatron
    from gdpo_megatron.planning.dry_run import RankRecord, ShardSums

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_bytes(number: float) -> str:
    """A number of bytes for a person.

    >>> in_bytes(1536)
    '1.5 KiB'
    """
    size, unit = float(number), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.{1 if size < 100 else 0}f} {_UNITS[unit]}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Columns of text, the first `left` ones flush left, the others right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def layout_name(job: Job) -> str:
    """A layout in a word: TP8 x PP8 x DP16."""
    sizes = {
        "TP": job.tp,
        "PP": job.pp,
        "VP": job.vp,
        "CP": job.cp,
        "EP": job.ep,
        "ETP": job.etp,
    }
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    return " x ".join([*parts, f"DP{job.dp}"])


def rank_lines(job: Job, record: RankRecord) -> list[str]:
    """What a rank of a dry run holds, and what it would send."""
    place = record.place
    experts = f", ep {place.ep}, expert-tp {place.etp}" if job.arch.moe else ""
    lines = [
        f"rank {place.rank} of {job.world_size} ({layout_name(job)}): tp {place.tp}, "
        f"pp {place.pp}, dp {place.dp}, cp {place.cp}{experts}",
        f"  {record.num_parameters:,} parameters: {in_bytes(record.parameter_bytes)}, gradients "
        f"{in_bytes(record.gradient_bytes)}, optimizer {in_bytes(record.optimizer_bytes)}",
        f"  micro-batches of {record.shape[0]} x {record.shape[1]} tokens, "
        f"{record.num_microbatches} of the {record.config_microbatches} of an update were run",
    ]
    for phase in record.phases:
        lines += [
            "",
            f"{phase.name}: {in_bytes(phase.peak_bytes)} at most above "
            f"{in_bytes(phase.held_bytes)} held",
        ]
        rows = [
            (
                f"  {it.kind}",
                it.group,
                str(it.group_size),
                in_bytes(it.num_bytes),
                str(it.count),
                in_bytes(it.num_bytes * it.count),
            )
            for it in phase.traffic
        ]
        if rows:
            lines += table(("  message", "group", "ranks", "of each", "count", "in all"), rows, 2)
        else:
            lines.append("  no messages")
    return lines


def shard_lines(job: Job, sums: ShardSums) -> list[str]:
    """Whether the shards of a layout are the model."""
    text = f"shards of the {sums.num_places} places of the layout: {sums.num_parameters:,}"
    extra = [
        f"{count:,} of {what}"
        for count, what in (
            (sums.padding, "the vocabulary's padding"),
            (sums.tied_copies, "the tied embedding's second copy"),
        )
        if count
    ]
    of_model = " + ".join([f"{sums.model_parameters:,} of the model", *extra])
    lines = [f"{text} parameters {'=' if sums.is_whole else 'are not'} {of_model}"]
    return lines + [f"  {problem}" for problem in sums.problems]
