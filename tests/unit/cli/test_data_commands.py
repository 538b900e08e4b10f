"""`data prepare`, `data check` and `data formats` as a person uses them, and a run on mixed rows.

What prepare does with rows is in tests/unit/data. Left out: how the progress looks on a terminal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli_job import Cli, Job

FORMATS = ["code", "gsm8k", "humaneval", "math", "mbpp", "rows", "toolrl"]

USER_FORMAT = """
def poems(row, *, lines=2):
    return {"prompt": row["title"], "answer": str(lines)}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prepare_and_check(folder: Path, run_cli: Cli):
    write(folder / "a.jsonl", [{"question": name, "answer": f"#### {name}"} for name in "123"])
    write(folder / "b.jsonl", [{"question": name, "answer": "#### 1"} for name in ("4", " ", "1")])
    done = run_cli(
        *("data", "prepare", "gsm8k", "a.jsonl", "b.jsonl", "--output", "out.jsonl"),
        *("--rewards", "right,short", "--chat", "--prompt-template", "{prompt} = ?"),
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[2:] == [
        "file     rows  written  empty_prompt  duplicate_prompt",
        "a.jsonl     3        3             0                 0",
        "b.jsonl     3        1             1                 1",
        "all         6        4             1                 1",
        "out.jsonl: 4 rows",
        "out.rejected.jsonl: 2 rows set aside",
    ]
    assert read(folder / "out.jsonl")[0] == {
        "id": "gsm8k/a/1",
        "prompt": [{"role": "user", "content": "1 = ?"}],
        "answer": "1",
        "source": "gsm8k",
        "rewards": ["right", "short"],
        "problem": "1",
        "solution": "#### 1",
    }
    assert run_cli("data", "check", "out.jsonl") == type(done)(
        0, "out.jsonl: 4 rows (gsm8k 4): all as the schema has them\n", ""
    )
    found = run_cli("data", "check", "out.jsonl", "b.jsonl")
    assert found.code == 1
    assert found.out.splitlines()[1:3] == [
        "b.jsonl:1: no field 'id'",
        "b.jsonl:1: no field 'prompt'",
    ]
    assert found.out.splitlines()[-1] == "b.jsonl: 3 rows (): 9 problems"


def test_any_rows_and_a_format_of_ones_own(folder: Path, run_cli: Cli):
    write(folder / "in.jsonl", [{"title": "Spring", "deep": {"gold": 3}}])
    (folder / "mine.py").write_text(USER_FORMAT)
    command = ("data", "prepare", "rows", "in.jsonl", "--output", "rows.jsonl")
    keys = ("--prompt-key", "title", "--answer-key", "deep.gold", "--source", "poems")
    assert run_cli(*command, *keys).code == 0
    command = ("data", "prepare", "./mine.py:poems", "in.jsonl", "--output", "mine.jsonl")
    assert run_cli(*command, "--set", "lines=4").code == 0
    for name, answer in (("rows", "3"), ("mine", "4")):
        (row,) = read(folder / f"{name}.jsonl")
        assert (row["prompt"], row["answer"], row["source"]) == ("Spring", answer, "poems")


def test_formats_are_listed(run_cli: Cli):
    done = run_cli("data", "formats")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == FORMATS


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("no.jsonl", "data file no.jsonl: no such file; did you mean 'in.jsonl'?"),
        ("in.txt", "data file in.txt: must be .jsonl or .parquet"),
        ("in.jsonl --max-prompt-tokens 5", "--max-prompt-tokens needs --tokenizer"),
        ("in.jsonl --prompt-key x", "format 'gsm8k' takes no argument 'prompt_key'; choices: none"),
        ("in.jsonl", "in.jsonl: none of 1 rows is left: empty_prompt 1"),
        ("in.jsonl --tokenizer nowhere", "tokenizer nowhere: no such folder or file"),
    ],
)
def test_bad_input(folder: Path, run_cli: Cli, arguments: str, line: str):
    write(folder / "in.jsonl", [{"question": "", "answer": "#### 1"}])
    done = run_cli("data", "prepare", "gsm8k", *arguments.split(), "--output", "out.jsonl")
    assert (done.code, done.err) == (2, f"gdpo-megatron: {line}\n")
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    "arguments", ["--rewards a,,b", "--rewards a,a", "--set x", "--set 1=2", "--limit 0"]
)
def test_bad_arguments(folder: Path, run_cli: Cli, arguments: str):
    done = run_cli("data", "prepare", "gsm8k", "x.jsonl", "--output", "o.jsonl", *arguments.split())
    assert done.code == 2 and f"argument {arguments.split()[0]}: '" in done.err


# ---- a run on rows that name their rewards -------------------------------------------------------


def test_rewards_of_rows_are_those_of_the_config(job: Job, run_cli: Cli):
    rows = [
        {"prompt": "1 + 1 =", "answer": "#### 2", "rewards": ["right"]},
        {"prompt": "say", "answer": None, "rewards": ["short"]},
        {"prompt": "any", "answer": "#### 3"},
    ]
    job.write_rows(rows)
    assert run_cli("train", "config.yaml").code == 0
    bad = [["rigth"], ["short", "rigth"], "right", []]
    job.write_rows([*rows, *({**rows[0], "rewards": names} for names in bad)])
    job.edit({"data.eval": "rows.jsonl"})
    done = run_cli("train", "config.yaml")
    start = f"gdpo-megatron: {job.folder / 'rows.jsonl'}"
    why = "must be a list of reward names, is"
    assert done.code == 2 and done.err.splitlines()[:3] == [
        f"{start}:4: field 'rewards': the config has no reward named 'rigth'; did you mean "
        "'right'? (also 5)",
        f"{start}:6: field 'rewards' {why} 'right' (str); leave it out where all rewards apply",
        f"{start}:7: field 'rewards' {why} an empty list; leave it out where all rewards apply",
    ]
    assert len(job.started) == 1


def test_rows_are_refused_where_no_reward_may_be_missing(job: Job, run_cli: Cli):
    row = {"prompt": "1 + 1 =", "answer": "#### 2"}
    job.edit({"advantage": {"missing": "error"}})
    job.write_rows([row, {**row, "rewards": ["right", "short"]}])
    assert run_cli("train", "config.yaml").code == 0
    job.write_rows([row, {**row, "id": "a", "rewards": ["right"]}, {**row, "rewards": ["short"]}])
    done = run_cli("train", "config.yaml")
    assert (done.code, done.err) == (
        2,
        f"gdpo-megatron: advantage.missing is 'error', but 2 rows of {job.folder / 'rows.jsonl'} "
        "leave rewards out by their field 'rewards', the first is 'a'; missing: exclude is for "
        "such data\n",
    )
