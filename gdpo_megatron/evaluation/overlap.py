"""Prompts of evaluation sets that a run trains on as well: no figure of such a set means anything.

The problems of prepared data are compared, else the prompts without system messages; as text, with
case and runs of blanks ignored. A question in other words is not found here: `gdpo-megatron data
prepare` looks for these, by n-grams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import DataConfig
from gdpo_megatron.data.overlap import normalized
from gdpo_megatron.data.rows import DataRow, read_rows
from gdpo_megatron.data.schema import task_text
from gdpo_megatron.evaluation.sets import EvalSet

_NUM_SHOWN = 3


def overlap_problems(sets: Sequence[EvalSet], data: DataConfig, base_dir: Path) -> list[str]:
    """One line for each set with prompts that are in data.train too.

    Args:
        sets: to look at.
        data: with the file of data.train.
        base_dir: folder that relative paths start from.

    Raises:
        InputError: a file cannot be read.
    """
    assert data.train is not None
    trained = {_task(row): row for row in read_rows(data, data.train, base_dir=base_dir, kind="rl")}
    problems: list[str] = []
    for eval_set in sets:
        rows = read_rows(eval_set.data, eval_set.path, base_dir=base_dir, kind="rl")
        pairs = [(row, trained.get(_task(row))) for row in rows]
        shared = {row.prompt_id: twin for row, twin in pairs if twin is not None}
        if shared:
            problems.append(_told(eval_set, shared, len(rows), data.train, base_dir))
    return problems


def _task(row: DataRow) -> str:
    text = task_text({"problem": row.metadata.get("problem"), "prompt": row.prompt})
    return normalized(text).casefold()


def _told(
    eval_set: EvalSet, shared: Mapping[str, DataRow], num_rows: int, train: str, base_dir: Path
) -> str:
    named = [f"'{name}' is '{row.prompt_id}'" for name, row in list(shared.items())[:_NUM_SHOWN]]
    more = f" and {len(shared) - len(named)} more" if len(shared) > len(named) else ""
    return (
        f"{resolve_path(base_dir, eval_set.path)}: {len(shared)} of {num_rows} prompts are in "
        f"data.train ({resolve_path(base_dir, train)}) too: {', '.join(named)}{more}; take them "
        "out of one of the two, or set eval.allow_train_overlap: true"
    )
