"""lm-eval and bfcl-eval themselves, by our scripts, in their own environments.

A server of this process gives answers whose score is known, so that a figure shows that prompts,
answers and golds met; then vLLM serves a converted export of a tiny random model to both, and
lm-eval's likelihoods are held against transformers'. Not covered: GPUs, models of real size, other
categories of bfcl-eval, lm-eval's own tasks, which need the model hub.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.completion_server import MODEL, TOKEN, CompletionServer, completion_server
from support.jobs import Ended, RunningJob, read_jsonl, running, succeed

from gdpo_megatron.tiny_model import make_tiny_model

# The environments are made by `scripts/test.sh --full`, before it runs the tests that need vLLM.
pytestmark = [pytest.mark.full, pytest.mark.vllm]

REPO = Path(__file__).resolve().parents[2]
VENV = Path(os.environ.get("GDPO_VENV", REPO / ".venv"))
NUM_ROWS, NUM_CASES = 8, 4
SECONDS = 1800.0  # until a job is given up; on an idle machine they take 30 to 90


def needs(mode: str) -> None:
    if not Path(f"{VENV}-{mode}/.gdpo-ready").is_file():
        # `scripts/test.sh --full` makes it; one who runs this file alone may not have it.
        pytest.skip(f"no environment {VENV}-{mode}; scripts/setup.sh {mode} makes it")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word problems in the project's schema."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    draw = random.Random(1)
    with path.open("w") as file:
        for index in range(NUM_ROWS):
            one, two = draw.randrange(1000, 5000), draw.randrange(10, 99)
            prompt = f"Kim has {one} apples and buys {two} more. How many apples are there?"
            row = {"id": f"sums/{index}", "prompt": prompt, "answer": str(one + two)}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that went to Megatron's format and back by our own converter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("export")
    source = folder / "source"
    text = " ".join(path.read_text() for path in sorted((REPO / "docs").glob("*.md")))
    make_tiny_model(source, [text], vocab_size=1500)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(source)
    config.initializer_range = 0.15  # far from uniform
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    succeed("convert", source, folder / "megatron", "--to", "megatron")
    succeed("convert", folder / "megatron", folder / "tiny-export", "--to", "hf")
    return folder / "tiny-export"


def evaluate(
    script: str, server: CompletionServer, export: Path, output: Path, *arguments: str
) -> Ended:
    """Run one of the two against the server of a test."""
    command = [sys.executable, str(REPO / "tools" / script), "--output", str(output), *arguments]
    command += ["--url", server.url, "--model", MODEL, "--export", str(export)]
    with running(command, GDPO_SERVE_TOKEN=TOKEN, HOME="/nowhere") as job:
        return ended(job)


def wait_for(job: RunningJob, condition: Callable[[], bool]) -> None:
    """Wait for it, or for the job's end; both take longer than other jobs' on busy cores."""
    end = time.monotonic() + SECONDS
    while job.process.poll() is None and not condition():
        if time.monotonic() > end:
            pytest.fail(f"it takes too long; it wrote:\n{job.output[-4000:]}", pytrace=False)
        time.sleep(0.1)


def ended(job: RunningJob) -> Ended:
    """How it ended."""
    wait_for(job, lambda: False)
    return job.wait()


def summary(output: Path) -> dict[str, Any]:
    found = json.loads((output / "summary.json").read_text())
    assert set(found["files"]) == {
        str(it.relative_to(output)) for it in output.rglob("*") if it.is_file()
    } - {"summary.json"}
    for path in output.rglob("*"):
        assert not path.is_file() or TOKEN not in path.read_text(), f"the token is in {path}"
    assert not (output / "work").exists()
    return found


def values(found: dict[str, Any]) -> dict[str, float]:
    return {f"{it['task']} {it['metric']}": it["value"] for it in found["results"]}


# ---- answers whose score is known ---------------------------------------------------------------


def test_lm_eval_gives_golds_full_marks(rows: Path, export: Path, tmp_path: Path) -> None:
    """Five of eight answers have the form, six the number."""
    needs("lm-eval")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    golds = {row["prompt"]: (index, row["answer"]) for index, row in enumerate(read_jsonl(rows))}

    def answer(prompt: list[int]) -> str:
        text = tokenizer.decode(prompt)
        asked = re.fullmatch("Question: (.*)\nAnswer:", text)
        assert asked is not None, text
        index, gold = golds[asked[1]]
        if index < 5:
            return f" Let us add 2 and 2.\n#### {gold}"
        return f" So it is {gold}." if index == 5 else " I would say 3"

    with completion_server(answer) as server:
        job = evaluate(
            "eval_lm_eval.py", server, export, tmp_path / "out", "--task", "rows_final_number",
            "--data", str(rows),
        )  # fmt: skip
    assert job.code == 0, job.output
    found = summary(tmp_path / "out")
    assert values(found) == {
        "rows_final_number exact_match (strict)": 5 / 8,
        "rows_final_number exact_match (flexible)": 6 / 8,
    }
    assert found["counts"] == {"num_requests": NUM_ROWS, "num_empty": 0, "num_prompts_cut": 0}
    assert found["data"][0]["num_rows"] == len(server.prompts) == NUM_ROWS
    assert server.refused == 0


def bfcl_answers(num_right: int) -> Callable[[str], str]:
    """Calls of the first cases of simple_python, as the leaderboard's system prompt wants them."""
    [data] = Path(f"{VENV}-bfcl").glob("lib/*/site-packages/bfcl_eval/data")
    cases = read_jsonl(data / "BFCL_v4_simple_python.json")[:NUM_CASES]
    golds = read_jsonl(data / "possible_answer/BFCL_v4_simple_python.json")
    answers = {}
    for index, (case, gold) in enumerate(zip(cases, golds, strict=False)):
        assert case["id"] == gold["id"]
        [(name, parameters)] = gold["ground_truth"][0].items()
        if index >= num_right:
            name = "another"
        given = ", ".join(
            f"{it}={value[0]!r}" for it, value in parameters.items() if value[0] != ""
        )
        [[message]] = case["question"]
        answers[message["content"]] = f"[{name}({given})]"

    def answer(prompt: str) -> str:
        [found] = [text for question, text in answers.items() if question in prompt]
        return found

    return answer


BFCL = ("--category", "simple_python", "--limit", str(NUM_CASES))


def test_bfcl_gives_golds_full_marks(export: Path, tmp_path: Path) -> None:
    """Three of four calls are right."""
    needs("bfcl")
    with completion_server(bfcl_answers(num_right=3)) as server:
        job = evaluate("eval_bfcl.py", server, export, tmp_path / "out", *BFCL)
    assert job.code == 0, job.output
    found = summary(tmp_path / "out")
    [result] = found["results"]
    assert (result["task"], result["value"], result["num_samples"]) == ("simple_python", 0.75, 4)
    assert result["errors"] == {"simple_function_checker:wrong_func_name": 1}
    assert found["counts"] == {"num_requests": 4, "num_truncated": 0, "num_errors": 0}
    assert server.refused == 0 and len(server.prompts) == 4
    for prompt in server.prompts:  # its system prompt with the functions, in the chat template
        system, user = prompt.split("<|im_end|>\n<|im_start|>user\n")
        assert system.startswith("<|im_start|>system\n")
        assert "calculate_triangle_area" in system or "Find the area" not in user
        assert user.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_bfcl_failed_requests_are_no_wrong_answers(export: Path, tmp_path: Path) -> None:
    """bfcl-eval itself goes on and scores them; the script ends with an error and their number."""
    needs("bfcl")
    with completion_server(lambda _prompt: None) as server:
        job = evaluate("eval_bfcl.py", server, export, tmp_path / "out", *BFCL)
    assert job.code == 1
    assert "4 requests failed, which bfcl-eval counts as wrong answers" in job.output
    assert summary(tmp_path / "out")["counts"]["num_errors"] == 4


def test_bfcl_unknown_names(export: Path, tmp_path: Path) -> None:
    needs("bfcl")
    for arguments, said in (
        (("--category", "simple"), "--category simple: choices: simple_python, simple_java"),
        ((*BFCL, "--like", "Qwen"), "--like Qwen: choices: "),
    ):
        with completion_server(lambda _prompt: "") as server:
            output = tmp_path / said[:6].strip("-")
            job = evaluate("eval_bfcl.py", server, export, output, *arguments)
        assert job.code == 2 and f"eval_bfcl.py: {said}" in job.output, job.output


# ---- vLLM serves a model ------------------------------------------------------------------------


def mean_log_likelihood(export: Path, rows: Path) -> float:
    """Of the answers, by transformers in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model: Any = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    total = 0.0
    for row in read_jsonl(rows):
        question = tokenizer(f"Question: {row['prompt']}\nAnswer:").input_ids
        tokens = tokenizer(f"Question: {row['prompt']}\nAnswer: {row['answer']}").input_ids
        assert tokens[: len(question)] == question
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        places = range(len(question), len(tokens))
        total += sum(float(logprobs[place - 1, tokens[place]]) for place in places)
    return total / NUM_ROWS


def test_both_evaluate_an_export_that_vllm_serves(export: Path, rows: Path, tmp_path: Path) -> None:
    needs("lm-eval")
    needs("bfcl")
    python, tools = shlex.quote(sys.executable), shlex.quote(str(REPO / "tools"))
    lm_eval, bfcl = tmp_path / "lm eval", tmp_path / "bfcl"
    both = (
        f"{python} {tools}/eval_lm_eval.py --task rows_final_number --task rows_answer_likelihood "
        f"--data {shlex.quote(str(rows))} --max-tokens 32 --output {shlex.quote(str(lm_eval))} && "
        f"{python} {tools}/eval_bfcl.py --category simple_python --limit {NUM_CASES} "
        f"--output {shlex.quote(str(bfcl))}"
    )
    log = tmp_path / "server.log"
    # The model's config says 4,096: what random weights say is cut off sooner.
    command = [str(REPO / "tools/serve_hf_export.sh"), str(export), "--port", "0"]
    command += ["--max-model-len", "2048", "--log", str(log)]
    with running([*command, "--", "bash", "-c", both], GDPO_SERVE_TOKEN=TOKEN) as job:
        wait_for(job, lambda: "is served at" in job.output)
        family = job.family()
        assert not any(TOKEN in argument for it in family for argument in cmdline(it))
        job_end = ended(job)
    assert job_end.code == 0, job_end.output + log.read_text()[-2000:]
    _, alive = psutil.wait_procs(family, 60)
    assert not alive
    print(job_end.output)

    found = summary(lm_eval)
    assert found["model"]["context_length"] == 2048
    assert found["counts"] == {"num_requests": 2 * NUM_ROWS, "num_empty": 0, "num_prompts_cut": 0}
    likelihood = -math.log(values(found)["rows_answer_likelihood perplexity"])
    assert likelihood == pytest.approx(mean_log_likelihood(export, rows), abs=1e-3)
    assert values(found)["rows_final_number exact_match (strict)"] == 0.0

    found = summary(bfcl)
    assert values(found) == {"simple_python accuracy": 0.0}
    assert found["counts"]["num_requests"] == NUM_CASES and found["counts"]["num_errors"] == 0
    [result] = bfcl.rglob("BFCL_v4_simple_python_result.json")
    tokens = [it["input_token_count"] + it["output_token_count"] for it in read_jsonl(result)]
    assert len(tokens) == NUM_CASES and max(tokens) <= 2048 and min(tokens) > 300


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
