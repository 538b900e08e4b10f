"""Evaluate a served model with bfcl-eval, the function-calling leaderboard's own program.

    tools/serve_hf_export.sh EXPORT_FOLDER --
        python tools/eval_bfcl.py --category simple_python --output DIR

It runs bfcl-eval's `generate` and `evaluate` in the environment that `scripts/setup.sh bfcl` makes.
The data are those of the leaderboard's version 4, inside the package: figures are not comparable
with those of version 3, which the paper reports. By default the model gets the leaderboard's own
system prompt in the export's chat template and answers with calls as text; --like takes the prompts
and the parser of a model of the leaderboard. Results: DIR/summary.json and bfcl-eval's own files.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from outside import evaluator
from outside.evaluator import EvaluatorFailed, Summary

from gdpo_megatron.errors import InputError

ENVIRONMENT = evaluator.Environment("bfcl", ("bfcl_eval", "transformers", "openai"))
MAIN = Path(__file__).parent / "outside" / "bfcl_main.py"
REFUSED = "INPUT ERROR: "
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
NO_ANSWER = "Error during inference:"
"""How bfcl-eval marks the result of a request that failed, which it then counts as a wrong one."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this evaluator alone."""
    parser.add_argument(
        "--category",
        action="append",
        required=True,
        help="of bfcl-eval, or a group of them: simple_python, non_live, live, multi_turn, "
        "single_turn ...; repeatable",
    )
    parser.add_argument(
        "--like",
        metavar="MODEL",
        help="take prompts and parser of this model of bfcl-eval, e.g. Qwen/Qwen3-4B-FC",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.001, help="default: 0.001, as the leaderboard"
    )


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All rows."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def copy_tokenizer(export: Path, folder: Path) -> Path:
    """Config and tokenizer without code: bfcl-eval would run a Python file of the folder."""
    folder.mkdir()
    for pattern in TOKENIZER_FILES:
        for path in export.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
    return folder


def standard_error(share: float, num_samples: int) -> float | None:
    """Of a share, as lm-eval computes it; None for a single sample."""
    return math.sqrt(share * (1 - share) / (num_samples - 1)) if num_samples > 1 else None


def figures(output: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """From bfcl-eval's files: rows of the summary, and results of requests that failed."""
    rows, failed = [], []
    for path in sorted((output / "score").rglob("BFCL_v4_*_score.json")):
        head, *wrong = read_json_lines(path)
        rows.append(
            {
                "task": path.name.removeprefix("BFCL_v4_").removesuffix("_score.json"),
                "metric": "accuracy",
                "value": head["accuracy"],
                "stderr": standard_error(head["accuracy"], head["total_count"]),
                "num_samples": head["total_count"],
                "num_correct": head["correct_count"],
                "errors": dict(Counter(str(it.get("error_type")) for it in wrong)),
            }
        )
    for path in sorted((output / "result").rglob("BFCL_v4_*_result.json")):
        failed += [it for it in read_json_lines(path) if str(it["result"]).startswith(NO_ANSWER)]
    return rows, failed


def run(options: argparse.Namespace, work: Path) -> None:
    """Evaluate."""
    if not 0 <= options.temperature <= 2:
        raise InputError(f"--temperature {options.temperature}: must be from 0 to 2")
    python = ENVIRONMENT.python()
    endpoint, context = evaluator.connect(options)
    started = time.monotonic()
    output: Path = options.output
    environment = evaluator.variables(endpoint, work) | {
        "BFCL_PROJECT_ROOT": str(output),
        "REMOTE_OPENAI_BASE_URL": endpoint.url,
        "REMOTE_OPENAI_TOKENIZER_PATH": str(copy_tokenizer(options.export, work / "tokenizer")),
    }
    settings = {
        "categories": options.category,
        "like": options.like,
        "limit": options.limit,
        "temperature": options.temperature,
        "concurrency": options.concurrency,
    }
    counts = work / "counts.json"
    spec = output / "spec.json"
    spec.write_text(
        json.dumps(
            {
                **settings,
                "model": endpoint.model,
                "context_length": context,
                "counts": str(counts),
            }
        )
    )
    command = [str(python), str(MAIN), str(spec)]
    log = output / "log.txt"
    try:
        evaluator.run_logged(command, environment, log)
    except EvaluatorFailed:
        refused = [it for it in log.read_text().splitlines() if it.startswith(REFUSED)]
        if refused:
            raise InputError(refused[-1].removeprefix(REFUSED)) from None
        raise

    shutil.rmtree(output / ".file_locks", ignore_errors=True)
    rows, failed = figures(output)
    if not rows:
        raise EvaluatorFailed(f"bfcl-eval wrote no scores; log: {log}")
    versions = ENVIRONMENT.versions()
    summary = Summary(
        evaluator={"name": "bfcl-eval", "version": versions["bfcl_eval"], "data": "BFCL_v4"},
        model=evaluator.model_facts(options, endpoint, context),
        settings=settings,
        results=rows,
        counts={**json.loads(counts.read_text()), "num_errors": len(failed)},
        versions=versions,
        command=command,
    )
    evaluator.finish(summary, output, work, started)
    if failed:
        raise EvaluatorFailed(
            f"{len(failed)} requests failed, which bfcl-eval counts as wrong answers; the first: "
            f"{failed[0]['id']}: {str(failed[0]['result'])[:200]}; log: {log}"
        )


if __name__ == "__main__":
    sys.exit(evaluator.be_program(str(__doc__), add_options, run))
