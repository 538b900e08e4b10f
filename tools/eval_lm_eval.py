"""Evaluate a served model with EleutherAI's lm-eval: text completions, log-probs of given text.

    tools/serve_hf_export.sh EXPORT_FOLDER --
        python tools/eval_lm_eval.py --task rows_final_number --data FILE.jsonl --output DIR

It is lm-eval's `local-completions`, with the export's own tokenizer, in the environment that
`scripts/setup.sh lm-eval` makes. The tasks `rows_...` read rows of this project's schema (fields
`prompt` and `answer`); with --online any task that lm-eval brings can be named, which then loads
its data set from the model hub. Results: DIR/summary.json, and lm-eval's own files beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from outside import evaluator
from outside.evaluator import EvaluatorFailed, Summary
from outside.lm_eval_tasks.rows import VARIABLE as DATA_VARIABLE

from gdpo_megatron.errors import InputError

ENVIRONMENT = evaluator.Environment("lm-eval", ("lm_eval", "transformers", "datasets"))
TASKS = Path(__file__).parent / "outside" / "lm_eval_tasks"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this evaluator alone."""
    own = ", ".join(sorted(it.stem for it in TASKS.glob("rows_*.yaml")))
    parser.add_argument(
        "--task", action="append", required=True, help=f"{own}; with --online others; repeatable"
    )
    parser.add_argument("--data", type=Path, help="rows for the tasks rows_..., JSON lines")
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="of a completion (default: 512)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put prompts into the tokenizer's chat template"
    )
    parser.add_argument(
        "--num-fewshot", type=int, help="examples before each question, with --online"
    )
    parser.add_argument(
        "--seconds-per-request", type=int, default=600, help="before it is repeated (default: 600)"
    )
    parser.add_argument("--online", action="store_true", help="allow the model hub")


def check(options: argparse.Namespace) -> int:
    """Look at tasks and data before a server is asked.

    Returns:
        The number of rows; 0 without --data.
    """
    own = {it.stem for it in TASKS.glob("rows_*.yaml")}
    for task in options.task:
        if task not in own and not options.online:
            raise InputError(
                f"--task {task}: not one of {', '.join(sorted(own))}; lm-eval's own tasks load "
                "their data sets from the model hub, which --online allows"
            )
        if task in own and options.data is None:
            raise InputError(f"--task {task}: needs --data")
        if task in own and options.num_fewshot:
            raise InputError(f"--num-fewshot {options.num_fewshot}: {task} has no examples")
    if options.max_tokens < 1:
        raise InputError(f"--max-tokens {options.max_tokens}: must be 1 or more")
    return 0 if options.data is None else check_rows(options.data)


def check_rows(path: Path) -> int:
    """The number of rows of a file, all of which have the two texts.

    Raises:
        InputError: names file, line and field.
    """
    if not path.is_file():
        raise InputError(f"--data {path}: no such file")
    num_rows = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not JSON: {error}") from error
            for name in ("prompt", "answer"):
                value = row.get(name) if isinstance(row, dict) else None
                if not isinstance(value, str) or not value.strip():
                    raise InputError(f"{path}:{number}: {name} must be text, and is {value!r:.60}")
            num_rows += 1
    if num_rows == 0:
        raise InputError(f"{path}: no rows")
    return num_rows


def command_line(
    options: argparse.Namespace, python: Path, url: str, context: int, output: Path
) -> list[str]:
    """How lm-eval is started."""
    model = {
        "model": options.model,
        "base_url": f"{url}/completions",
        "tokenizer": str(options.export.resolve()),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": options.concurrency,
        "max_length": context,
        "max_retries": 2,
        "timeout": options.seconds_per_request,
    }
    command = [str(python), "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", json.dumps(model)]
    command += ["--tasks", *options.task, "--include_path", str(TASKS)]
    command += ["--gen_kwargs", f"max_gen_toks={options.max_tokens}"]
    command += ["--output_path", str(output / "lm_eval"), "--log_samples"]
    if options.chat:
        command.append("--apply_chat_template")
    if options.num_fewshot is not None:
        command += ["--num_fewshot", str(options.num_fewshot)]
    if options.limit is not None:
        command += ["--limit", str(options.limit)]
    return command


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the summary from lm-eval's file of results."""
    rows = []
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if "," not in name or "_stderr," in name or not isinstance(value, int | float):
                continue
            metric, by = name.split(",", 1)
            stderr = metrics.get(f"{metric}_stderr,{by}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if by == "none" else f"{metric} ({by})",
                    "value": value,
                    "stderr": stderr if isinstance(stderr, int | float) else None,
                    "num_samples": found["n-samples"][task]["effective"],
                }
            )
    return rows


def count(
    samples: list[dict[str, Any]], options: argparse.Namespace, context: int
) -> dict[str, int | None]:
    """Requests, completions without text, and prompts that lm-eval shortened.

    It cuts the beginning off a prompt that leaves no room for the completion, and says nothing.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.export.resolve(), local_files_only=True)
    seen = {}
    for it in samples:  # once for each filter
        for request, (first, second) in enumerate(it["arguments"]):
            seen[it["task"], it["doc_id"], request] = (first, second, it["resps"][request])
    num_cut = num_empty = 0
    for prompt, second, answers in seen.values():
        generates = isinstance(second, dict)
        tokens = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        room = second.get("max_gen_toks", 0) if generates else len(tokenizer(second).input_ids)
        num_cut += tokens + room > context - 1
        num_empty += generates and not all(str(it).strip() for it in answers)
    return {"num_requests": len(seen), "num_empty": num_empty, "num_prompts_cut": num_cut}


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """All rows of lm-eval's samples files, each with its task."""
    rows = []
    for path in folder.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        for line in path.read_text().splitlines():
            row = json.loads(line)
            arguments = row["arguments"]
            if isinstance(arguments, dict):
                arguments = [tuple(it.values()) for it in arguments.values()]
            rows.append({**row, "task": task, "arguments": arguments})
    return rows


def run(options: argparse.Namespace, work: Path) -> None:
    """Evaluate."""
    num_rows = check(options)
    python = ENVIRONMENT.python()
    endpoint, context = evaluator.connect(options)
    if options.max_tokens >= context - 1:
        raise InputError(
            f"--max-tokens {options.max_tokens}: leaves no room for a prompt in the {context} "
            "tokens that the server takes"
        )
    started = time.monotonic()
    output = options.output
    environment = evaluator.variables(endpoint, work, online=options.online)
    if options.data is not None:
        environment[DATA_VARIABLE] = str(options.data.resolve())
    command = command_line(options, python, endpoint.url, context, output)
    evaluator.run_logged(command, environment, output / "log.txt")

    files = list((output / "lm_eval").rglob("results_*.json"))
    if len(files) != 1:
        raise EvaluatorFailed(f"lm-eval wrote {len(files)} files of results, not one, to {output}")
    versions = ENVIRONMENT.versions()
    counts = count(read_samples(output / "lm_eval"), options, context)
    summary = Summary(
        evaluator={"name": "lm-eval", "version": versions["lm_eval"]},
        model=evaluator.model_facts(options, endpoint, context),
        settings={
            name: getattr(options, name)
            for name in ("task", "limit", "max_tokens", "chat", "num_fewshot", "concurrency")
        },
        results=figures(json.loads(files[0].read_text())),
        counts=counts,
        versions=versions,
        command=command,
    )
    if options.data is not None:
        summary.data = [{**evaluator.file_facts(options.data), "num_rows": num_rows}]
    evaluator.finish(summary, output, work, started)
    if counts["num_prompts_cut"]:
        print(
            f"note: lm-eval cut the beginning off {counts['num_prompts_cut']} prompts that leave "
            f"no room for {options.max_tokens} tokens",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(evaluator.be_program(str(__doc__), add_options, run))
