"""Loads rows of this project's schema for lm-eval, whose environment runs it.

The folder's tasks get the file from `tools/eval_lm_eval.py --data`, as the variable below.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

import os
from typing import Any

VARIABLE = "GDPO_LM_EVAL_DATA"


def load(**_metadata: Any) -> dict[str, Any]:
    """The split `test`: fields `prompt` and `answer`, both text; checked by eval_lm_eval.py."""
    import json

    import datasets

    with open(os.environ[VARIABLE], encoding="utf-8") as file:  # noqa: PTH123
        rows = [json.loads(line) for line in file if line.strip()]
    fields = [{name: row[name] for name in ("prompt", "answer")} for row in rows]
    return {"test": datasets.Dataset.from_list(fields)}
