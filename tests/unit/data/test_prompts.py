"""Data files to prompts and pairs; every problem of a file is named with its line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gdpo_megatron.config.schema import DataConfig
from gdpo_megatron.data.prompts import load_prompts, load_sft_rows
from gdpo_megatron.data.rows import read_rows
from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return load_tokenizer(byte_level_folder)


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    """Write rows; a str is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def problems(folder: Path, rows: list[Any], kind: Any = "rl", **options: Any) -> list[str]:
    """The messages for a file, without its path."""
    name = write(folder, rows)
    with pytest.raises(InputError) as error:
        read_rows(DataConfig(train=name, **options), name, base_dir=folder, kind=kind)
    return [problem.removeprefix(f"{folder / name}:") for problem in error.value.problems]


def load(folder: Path, tokenizer: Tokenizer, rows: list[Any], limit: int = 99, **options: Any):
    name = write(folder, rows)
    config = DataConfig(train=name, **options)
    return load_prompts(
        config, tokenizer, path=config.train, base_dir=folder, max_prompt_tokens=limit
    )


def test_a_plain_row(tmp_path: Path, tokenizer: Tokenizer):
    rows = [{"prompt": "the cat", "answer": "mat", "level": 3}, "", {"prompt": "a", "answer": 7}]
    first, second = load(tmp_path, tokenizer, rows)
    assert first.prompt_id == "rows.jsonl:1"
    assert tokenizer.decode(first.token_ids) == first.text == "the cat"
    assert first.answer == "mat"
    assert first.metadata == {"level": 3}
    # The empty line is none, but it counts.
    assert (second.prompt_id, second.answer, second.metadata) == ("rows.jsonl:3", "7", {})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4.50", "4.50"),
        (4.5, "4.5"),
        (True, "true"),
        (["a", "\u00e9"], '["a", "\u00e9"]'),
        ({"x": [1]}, '{"x": [1]}'),
        (None, None),
    ],
)
def test_answers(tmp_path: Path, tokenizer: Tokenizer, answer: Any, expected: str | None):
    (prompt,) = load(tmp_path, tokenizer, [{"prompt": "x", "answer": answer}])
    assert prompt.answer == expected


def test_no_answer_key(tmp_path: Path, tokenizer: Tokenizer):
    (prompt,) = load(tmp_path, tokenizer, [{"prompt": "x", "answer": "y"}], answer_key=None)
    assert prompt.answer is None
    assert prompt.metadata == {"answer": "y"}


def test_template_and_other_keys(tmp_path: Path, tokenizer: Tokenizer):
    (prompt,) = load(
        tmp_path,
        tokenizer,
        [{"question": "2+2", "level": 1, "gold": "4", "prompt": "unused"}],
        prompt_template="Q{level}: {question} {{}} A:",
        answer_key="gold",
    )
    assert prompt.text == "Q1: 2+2 {} A:"
    assert prompt.answer == "4"
    assert prompt.metadata == {"question": "2+2", "level": 1, "prompt": "unused"}


def test_chats(tmp_path: Path, tokenizer: Tokenizer):
    chat = [{"role": "user", "content": "the hat"}]
    (prompt,) = load(tmp_path, tokenizer, [{"prompt": chat, "answer": "x"}])
    assert prompt.text == "<|user|>the hat<eos><|assistant|>"
    assert prompt.token_ids == tuple(tokenizer.apply_chat_template(chat))
    (prompt,) = load(
        tmp_path, tokenizer, [{"prompt": "the hat", "answer": "x"}], system_prompt="be brief"
    )
    assert prompt.text == "<|system|>be brief<eos><|user|>the hat<eos><|assistant|>"


def test_begin_token_where_the_tokenizer_adds_one(tmp_path: Path, stories_folder: Path):
    for path in (stories_folder, stories_folder / "tokenizer.model"):
        rows = [{"prompt": "Once upon a time", "answer": ""}, {"prompt": "", "answer": ""}]
        first, second = load(tmp_path, load_tokenizer(path), rows)
        assert first.token_ids == (1, 403, 407, 261, 378)
        assert second.token_ids == (1,)


def test_prompt_ids(tmp_path: Path, tokenizer: Tokenizer):
    rows = [
        {"prompt": "x", "answer": "", "id": 7},
        {"prompt": "x", "answer": "", "id": 7, "prompt_id": "p"},
    ]
    first, second = load(tmp_path, tokenizer, rows)
    assert (first.prompt_id, first.metadata) == ("7", {})
    assert (second.prompt_id, second.metadata) == ("p", {"id": 7})


def test_parquet_rows_are_the_same(tmp_path: Path, tokenizer: Tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": "the cat"}], "answer": "a", "n": 1},
        {"prompt": [{"role": "user", "content": "the mat"}], "answer": "b", "n": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config = DataConfig(train="rows.parquet")
    prompts = load_prompts(
        config, tokenizer, path=config.train, base_dir=tmp_path, max_prompt_tokens=99
    )
    from_jsonl = load(tmp_path, tokenizer, rows)
    assert [p.prompt_id for p in prompts] == ["rows.parquet:1", "rows.parquet:2"]
    for ours, other in zip(prompts, from_jsonl, strict=True):
        assert (ours.token_ids, ours.answer, ours.metadata) == (
            other.token_ids,
            other.answer,
            other.metadata,
        )


def test_all_problems_of_a_file_together(tmp_path: Path):
    good = {"prompt": "x", "answer": "y"}
    rows = [
        good,
        '{"prompt": "x", ',
        {"promt": "x"},
        "[1]",
        {"prompt": 3, "answer": "y"},
        {"prompt": [], "answer": "y"},
        {"prompt": [{"role": "user", "content": "x"}, {"role": "user"}], "answer": "y"},
        {"prompt": "x", "answer": "y", "id": [1]},
        {"prompt": "x", "answer": "y", "id": "a"},
        {"prompt": "x", "answer": "y", "id": "a"},
        '{"prompt": "\\ud800", "answer": ""}',
    ]
    assert problems(tmp_path, rows) == [
        "2: bad JSON: Expecting property name enclosed in double quotes (column 16)",
        "3: no field 'prompt' (data.prompt_key); did you mean 'promt'?",
        "3: no field 'answer' (data.answer_key); choices: promt",
        "4: must be an object, is [1] (list)",
        "5: field 'prompt' must be a text or a list of chat messages, is 3 (int)",
        "6: field 'prompt' must be a text or a list of chat messages, is an empty list",
        "7: field 'prompt', message 2: 'content' must be a text, is missing",
        "8: field 'id' must be a string or integer, is [1] (list)",
        "10: id 'a' is already that of line 9",
        "11: holds half of a surrogate pair (\\ud8xx to \\udfxx)",
    ]


def test_equal_problems_are_one(tmp_path: Path):
    message = "1: no field 'answer' (data.answer_key); choices: prompt"
    row = {"prompt": "x"}
    assert problems(tmp_path, [row] * 3) == [f"{message} (also 2, 3)"]
    assert problems(tmp_path, [row] * 9) == [f"{message} (also 2, 3, 4 and 5 more lines)"]


def test_at_most_twenty_problems(tmp_path: Path):
    found = problems(tmp_path, [{"prompt": n, "answer": ""} for n in range(30)])
    assert len(found) == 21
    assert found[19].startswith("20: field 'prompt' must be")
    assert found[20].endswith(" 10 more problems")


def test_bytes_that_are_no_utf8(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff", "answer": ""}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:1: not UTF-8 \(byte 13 of the line\)"):
        read_rows(DataConfig(train="x"), tmp_path / "rows.jsonl")


def test_template_problems(tmp_path: Path):
    row = {"question": "x", "answer": "y", "list": [1]}
    assert problems(tmp_path, [row], prompt_template="{qestion} {list}") == [
        "1: no field 'qestion' (data.prompt_template); did you mean 'question'?"
    ]
    assert problems(tmp_path, [row], prompt_template="{list}") == [
        "1: field 'list' in data.prompt_template must be a text or number, is [1] (list)"
    ]
    for template in ("{", "{}", "{question!r}", "{question.x}", "{question:3}"):
        (problem,) = problems(tmp_path, [row], prompt_template=template)
        assert problem.startswith("data.prompt_template: ")
        assert "{{ for a brace" in problem


def test_system_prompt_is_for_strings(tmp_path: Path):
    row = {"prompt": [{"role": "user", "content": "x"}], "answer": "y"}
    (problem,) = problems(tmp_path, [row], system_prompt="be brief")
    assert problem.startswith("1: field 'prompt' holds chat messages, and data.system_prompt is")


def test_files_that_are_none(tmp_path: Path):
    write(tmp_path, [], "train.jsonl")
    config = DataConfig(train="x")

    def problem(path: str) -> str:
        with pytest.raises(InputError) as error:
            read_rows(config, path, base_dir=tmp_path)
        (line,) = error.value.problems
        return line

    assert problem("trian.jsonl").endswith("no such file; did you mean 'train.jsonl'?")
    assert problem("sub/train.jsonl").endswith(f"there is no folder {tmp_path / 'sub'}")
    assert problem("train.csv").endswith("train.csv: must be .jsonl or .parquet")
    assert problem("train.jsonl").endswith("train.jsonl: has no rows")
    write(tmp_path, ["x"], "train.parquet")
    assert "no readable parquet file" in problem("train.parquet")


def test_long_prompts_are_left_out_and_told(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
):
    rows = [{"prompt": "x" * n, "answer": ""} for n in (3, 9, 5, 6)]
    with caplog.at_level(logging.WARNING):
        prompts = load(tmp_path, tokenizer, rows, limit=5)
    assert [prompt.text for prompt in prompts] == ["xxx", "xxxxx"]
    assert "2 of 4 rows are left out, longer than a prompt of 5 tokens (longest 9)" in caplog.text
    assert len(load(tmp_path, tokenizer, rows, limit=5, max_prompt_tokens=3)) == 1
    with pytest.raises(InputError, match="all 4 rows are longer than a prompt of 2 tokens"):
        load(tmp_path, tokenizer, rows, limit=2)


def test_problems_that_need_the_tokenizer(tmp_path: Path, tokenizer: Tokenizer):
    rows = [
        {"prompt": "", "answer": ""},
        {"prompt": [{"role": "tool", "content": "x"}], "answer": ""},
    ]
    with pytest.raises(InputError) as error:
        load(tmp_path, tokenizer, rows)
    first, second = error.value.problems
    assert first.endswith(
        "rows.jsonl:1: the prompt is empty, and the tokenizer adds no begin token"
    )
    assert second.endswith("rows.jsonl:2: the chat template refuses it: no tools here")


def test_sft_rows(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture):
    rows = [
        {"prompt": "xy", "completion": "z"},
        {"prompt": "xy", "completion": "z" * 9},
        {"prompt": "x" * 5, "completion": "z"},
    ]
    name = write(tmp_path, rows)
    config = DataConfig(train=name, max_prompt_tokens=4)
    (row,) = load_sft_rows(config, tokenizer, path=name, base_dir=tmp_path, max_sequence_length=8)
    assert row.prompt_ids == tuple(tokenizer.encode("xy"))
    assert row.completion_ids == (*tokenizer.encode("z"), tokenizer.eos_token_id)
    assert "2 of 3 rows are left out" in caplog.text


def test_sft_problems(tmp_path: Path):
    rows = [{"prompt": "x"}, {"prompt": "x", "completion": ""}, {"prompt": "x", "completion": 3}]
    assert problems(tmp_path, rows, kind="sft") == [
        "1: no field 'completion' (data.completion_key); choices: prompt",
        "2: field 'completion' must be a text, is an empty str",
        "3: field 'completion' must be a text, is 3 (int)",
    ]


def test_sft_needs_an_end_token(tmp_path: Path, byte_level_folder: Path):
    (tmp_path / "tokenizer.json").write_text((byte_level_folder / "tokenizer.json").read_text())
    name = write(tmp_path, [{"prompt": "x", "completion": "y"}])
    with pytest.raises(InputError, match="has no end token"):
        load_sft_rows(
            DataConfig(train=name),
            load_tokenizer(tmp_path),
            path=name,
            base_dir=tmp_path,
            max_sequence_length=9,
        )


def test_real_files(stories_folder: Path):
    data = stories_folder.parents[1] / "data"
    read_rows(DataConfig(train="x", prompt_key="question"), data / "gsm8k/train.jsonl")
    tool_rl = DataConfig(train="x", answer_key="ground_truth")
    read_rows(tool_rl, data / "toolrl/train.jsonl")
    nested = DataConfig(train="x", answer_key="reward_model")
    read_rows(nested, data / "toolrl/test.parquet")
