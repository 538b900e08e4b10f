"""Preparing data: every bad row is named, counted and set aside, and nothing else is lost.

Formats and overlaps have tests of their own; real files are in test_asset_data.py. Not covered: a
disk that fills up in the middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpo_megatron.config.schema import DataConfig
from gdpo_megatron.data.check import check_prepared
from gdpo_megatron.data.prepare import Prepared, prepare
from gdpo_megatron.data.row_pipeline import PrepareOptions
from gdpo_megatron.data.rows import read_rows
from gdpo_megatron.data.set_aside import REASONS
from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return load_tokenizer(byte_level_folder)


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows; bytes and texts as they are."""
    lines = [
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def run(
    folder: Path, rows: list[Any], format: str = "gsm8k", tokenizer: Any = None, **options: Any
) -> Prepared:
    """Prepare rows of a file in.jsonl into out.jsonl."""
    source = write(folder / "in.jsonl", rows)
    given = {"inputs": (source,), "output": folder / "out.jsonl", "overwrite": True}
    return prepare(PrepareOptions(format=format, **(given | options)), tokenizer, base_dir=folder)


def refused(folder: Path, rows: list[Any], **options: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        run(folder, rows, **options)
    return [problem.replace(str(folder), "{here}") for problem in error.value.problems]


def gsm(question: str, answer: str = "so\n#### 4") -> dict[str, str]:
    return {"question": question, "answer": answer}


# ---- bad rows ------------------------------------------------------------------------------------


def row(row_id: str, question: Any, answer: Any = "#### 4") -> dict[str, Any]:
    return {"id": row_id, "question": question, "answer": answer}


BAD: list[tuple[Any, str, str]] = [
    ("{not json", "bad_json", "bad JSON: Expecting property name enclosed in double quotes"),
    (b'{"question": "\xff"}', "bad_utf8", "not UTF-8 (byte 15 of the line)"),
    ('{"question": "\\ud83d"}', "bad_unicode", "holds half of a surrogate pair"),
    ("[1]", "not_an_object", "must be an object, is [1] (list)"),
    ({"qestion": "x", "answer": ""}, "bad_field", "no field 'question'; did you mean 'qestion'?"),
    (row("a", 5), "bad_field", "must be a text or a list of chat messages, is 5 (int)"),
    ({**row("b", "x"), "rewards": "right"}, "bad_field", "must be a list of reward names"),
    (row("c", " \n"), "empty_prompt", "the prompt is blank"),
    (row("d", "1 + 3", "#### "), "bad_answer", "answer '#### ' holds no gold string"),
    (row("first", "1 + 3"), "duplicate_id", "id 'first' is that of {here}/in.jsonl:1"),
    (row("e", "good\u00a0 row"), "duplicate_prompt", "the prompt is that of {here}/in.jsonl:1"),
    (row("f", "good row", "5"), "duplicate_prompt", "in.jsonl:1, which has another answer"),
    (row("g", "In the SET"), "leak", "equal to {here}/set.jsonl:1 (e/1)"),
    (row("h", "x" * 12), "prompt_too_long", "12 tokens, above 10"),
    (row("i", "one more"), "beyond_limit", "3 rows are written"),
]


def test_all_that_is_bad_in_one_file(tmp_path: Path, tokenizer: Tokenizer):
    """Each kind of bad row between good ones: named, counted, kept as it was."""
    known = {"id": "e/1", "prompt": "in the set", "answer": "1", "source": "e"}
    against = write(tmp_path / "set.jsonl", [known])
    good = [row("first", "good row"), row("second", "2 + 2"), row("third", "3 + 1")]
    bad = [it for it, _, _ in BAD]
    prepared = run(
        tmp_path,
        [good[0], *bad[:4], "", *bad[4:7], good[1], *bad[7:14], good[2], bad[14]],
        format="rows",
        format_args={"prompt_key": "question"},
        check_answers="gsm8k_correctness",
        tokenizer=tokenizer,
        max_prompt_tokens=10,
        against=(against,),
        limit=3,
    )

    written, rejected = lines_of(prepared.output), lines_of(prepared.rejected)
    assert written == [
        {"id": it["id"], "prompt": it["question"], "answer": "#### 4", "source": "rows"}
        for it in good
    ]
    assert [it["reason"] for it in rejected] == [reason for _, reason, _ in BAD]
    assert [it["line"] for it in rejected] == [2, 3, 4, 5, 7, 8, 9, *range(11, 18), 19]
    assert {it["file"] for it in rejected} == {str(tmp_path / "in.jsonl")}
    for found, (content, _, detail) in zip(rejected, BAD, strict=True):
        assert detail in found["detail"].replace(str(tmp_path), "{here}")
        kept = base64.b64decode(found["base64"]) if "base64" in found else found.get("text")
        assert found.get("row", kept) == content

    manifest = json.loads(prepared.manifest_path.read_text())
    assert manifest == prepared.manifest
    assert manifest["num_rows"] == len(good) + len(BAD) == 18
    assert (manifest["num_written"], manifest["num_set_aside"]) == (3, 15)
    counts = Counter(reason for _, reason, _ in BAD)
    assert manifest["set_aside"] == dict(counts)
    # Every reason there is, but for two that the formats' own tests have.
    assert [*manifest["set_aside"], "other_task", "format_failed"] == sorted(
        REASONS, key=lambda it: (it in ("other_task", "format_failed"), REASONS.index(it))
    )
    assert manifest["inputs"][0]["set_aside"] == manifest["set_aside"]
    # What was written is what a run takes as it is.
    assert check_prepared(prepared.output).good
    assert len(read_rows(DataConfig(train="x"), prepared.output)) == 3


def user_format(row: Any) -> Any:
    """GSM8K with a row's own id, and two faults that a format of the user's may have."""
    fields = {"id": row.get("id"), "prompt": row["question"], "answer": row["answer"]}
    return 7 if row["question"] == "seven" else fields


def test_ids_and_formats_of_ones_own(tmp_path: Path):
    rows = [
        {"id": 1, **gsm("a")},
        {"id": "1", **gsm("b")},
        {"id": 2, **gsm("seven")},
        {"answer": "x"},
        {**gsm("c"), "id": None},
        {"id": True, **gsm("d")},
        {**gsm("e"), "answer": 5},
    ]
    prepared = run(tmp_path, rows, format=f"{Path(__file__).resolve()}:user_format")
    assert [it["id"] for it in lines_of(prepared.output)] == ["1", "user_format/in/5"]
    found = [(it["reason"], it["detail"]) for it in lines_of(prepared.rejected)]
    assert found == [
        ("duplicate_id", f"id '1' is that of {tmp_path / 'in.jsonl'}:1"),
        ("format_failed", "it returned 7 (int), not a dict"),
        ("format_failed", "KeyError: 'question'"),
        ("bad_field", "field 'id' must be a text, is True (bool)"),
        ("bad_field", "field 'answer' must be a text or null, is 5 (int)"),
    ]


def test_what_json_cannot_hold(tmp_path: Path):
    table = pa.table({"prompt": ["a", "b", "c"], "blob": [b"x", None, None], "n": [1.0, 2.0, None]})
    pq.write_table(table, tmp_path / "in.parquet")
    rows = write(tmp_path / "in.jsonl", ['{"prompt": "d", "x": NaN}', '{"prompt": "e"}'])
    prepared = prepare(
        PrepareOptions(
            format="rows",
            inputs=(tmp_path / "in.parquet", rows),
            output=tmp_path / "out.jsonl",
            format_args={"answer_key": None},
        )
    )
    assert [it["id"] for it in lines_of(prepared.output)] == [
        "rows/in/2",
        "rows/in/3",
        "rows/in-2/2",
    ]
    assert [(it["line"], it["reason"]) for it in lines_of(prepared.rejected)] == [
        (1, "bad_field"),
        (1, "bad_field"),
    ]
    assert "field 'blob' cannot be written as JSON" in lines_of(prepared.rejected)[0]["detail"]
    assert [source["num_rows"] for source in prepared.manifest["inputs"]] == [3, 2]


# ---- what is written -----------------------------------------------------------------------------


def test_the_same_inputs_and_options_give_the_same_bytes(tmp_path: Path):
    rows = [gsm("a", "\u2028 #### 1,600"), gsm("b"), "x"]
    texts: list[list[bytes]] = []
    for _ in range(2):
        prepared = run(tmp_path, rows)
        files = (prepared.output, prepared.rejected, prepared.manifest_path)
        texts.append([file.read_bytes() for file in files])
    assert texts[0] == texts[1]
    manifest = json.loads(texts[0][2])
    for name, data in (("output", texts[0][0]), ("rejected", texts[0][1])):
        assert manifest[name]["sha256"] == hashlib.sha256(data).hexdigest()
        assert manifest[name]["num_bytes"] == len(data)
    source = (tmp_path / "in.jsonl").read_bytes()
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256(source).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
        "out.manifest.json",
        "out.rejected.jsonl",
    ]


def test_rewards_source_and_limit(tmp_path: Path):
    prepared = run(
        tmp_path,
        [{"source": "aops", **gsm(name)} for name in "abc"] + [gsm(" ")],
        rewards=("right", "short"),
        source="mine",
        limit=2,
    )
    assert lines_of(prepared.output)[0] == {
        "id": "mine/in/1",
        "prompt": "a",
        "answer": "4",
        "source": "mine",
        "rewards": ["right", "short"],
        "solution": "so\n#### 4",
        "original": {"source": "aops"},
    }
    assert prepared.manifest["set_aside"] == {"empty_prompt": 1, "beyond_limit": 1}


def test_prepared_files_laid_together(tmp_path: Path):
    """They are rows themselves: ids, sources, rewards and all else are as they were."""
    first = run(tmp_path, [gsm("a"), gsm("b")], rewards=("right",), chat=True)
    one = first.output.rename(tmp_path / "one.jsonl")
    second = run(
        tmp_path, [gsm("c")], rewards=("short",), source="other", prompt_template="{prompt}?"
    )
    two = second.output.rename(tmp_path / "two.jsonl")
    mixed = prepare(PrepareOptions(format="rows", inputs=(one, two), output=tmp_path / "m.jsonl"))
    assert lines_of(mixed.output) == lines_of(one) + lines_of(two)
    assert [row["rewards"] for row in lines_of(mixed.output)] == [["right"], ["right"], ["short"]]
    again = prepare(
        PrepareOptions(format="rows", inputs=(one, two, one), output=tmp_path / "n.jsonl")
    )
    assert again.manifest["set_aside"] == {"duplicate_id": 2}


@pytest.mark.parametrize(
    ("options", "prompt", "problem"),
    [
        ({}, "a", None),
        ({"prompt_template": "Q: {prompt} {{}}"}, "Q: a {}", "a"),
        ({"prompt_template": "{question}, level {level}"}, "a, level 3", "a"),
        ({"chat": True}, [{"role": "user", "content": "a"}], None),
        (
            {"system_prompt": "S", "prompt_template": "{prompt}?"},
            [{"role": "system", "content": "S"}, {"role": "user", "content": "a?"}],
            "a",
        ),
    ],
)
def test_wrapped_prompts(tmp_path: Path, options: Any, prompt: Any, problem: str | None):
    (row,) = lines_of(run(tmp_path, [{"level": 3, **gsm("a")}], **options).output)
    assert row["prompt"] == prompt
    assert row.get("problem") == problem


def test_chat_prompts_are_not_wrapped(tmp_path: Path):
    rows = [
        {"prompt": [{"role": "user", "content": "x"}], "answer": ""},
        {"prompt": "y", "answer": ""},
    ]
    prepared = run(tmp_path, rows, format="rows", chat=True)
    (found,) = lines_of(prepared.rejected)
    assert found["detail"].startswith("the prompt is chat messages already; --prompt-template")


def test_tokens_are_counted_with_the_chat_template(tmp_path: Path, tokenizer: Tokenizer):
    # <|user|> a <eos> <|assistant|> is 4 tokens, each letter more is one.
    rows = [gsm("a"), gsm("abc")]
    prepared = run(tmp_path, rows, tokenizer=tokenizer, chat=True, max_prompt_tokens=4)
    assert [row["id"] for row in lines_of(prepared.output)] == ["gsm8k/in/1"]
    assert lines_of(prepared.rejected)[0]["detail"] == "6 tokens, above 4"
    assert prepared.manifest["prompt_tokens"] == {"median": 4, "longest": 4}
    rows = [
        {"prompt": [{"role": role, "content": "x"}], "answer": None} for role in ("tool", "user")
    ]
    prepared = run(tmp_path, rows, format="rows", tokenizer=tokenizer)
    assert lines_of(prepared.rejected)[0]["detail"] == "the chat template refuses it: no tools here"


def test_allowed_leaks_are_kept_and_listed(tmp_path: Path):
    row = {
        "id": "e/1",
        "prompt": "W: in the set",
        "problem": "in the set",
        "answer": "",
        "source": "e",
    }
    against = write(tmp_path / "set.jsonl", [row])
    prepared = run(
        tmp_path,
        [gsm("in the  set"), gsm("W: in the set")],
        against=(against,),
        allow_leaks=True,
    )
    assert prepared.manifest["num_written"] == 2
    assert prepared.manifest["allowed_leaks"] == [
        {"id": "gsm8k/in/1", "row": f"{against}:1 (e/1)", "share": 1.0}
    ]


def test_duplicates_may_stay(tmp_path: Path):
    rows = [gsm("a"), gsm("a")]
    assert run(tmp_path, rows).manifest["set_aside"] == {"duplicate_prompt": 1}
    assert run(tmp_path, rows, keep_duplicates=True).manifest["set_aside"] == {}


def stops(row: Any) -> Any:
    if row["question"] == "stop":
        raise KeyboardInterrupt
    return {"prompt": row["question"], "answer": None}


def test_files_stay_as_they_were_where_it_is_interrupted(tmp_path: Path):
    format = f"{Path(__file__).resolve()}:stops"
    run(tmp_path, [gsm("a"), gsm(" ")], format=format)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 4
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [gsm("b"), gsm("stop")], format=format)
    del before["in.jsonl"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert len(list(tmp_path.iterdir())) == 4


JUNK = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b'{"prompt": "', b'"}', b"\\ud800", b"null", b"[", b"\xff", b" ", b"\x0b"]),
    st.builds(
        lambda prompt, more: json.dumps({"prompt": prompt, **more}).encode(),
        st.text(max_size=3),
        st.dictionaries(
            st.sampled_from(["id", "rewards", "source", "problem", "prompt_id", "x"]),
            st.one_of(st.none(), st.integers(0, 2), st.text(max_size=2), st.lists(st.just("r"))),
        ),
    ),
)


@given(st.lists(st.lists(JUNK, min_size=1, max_size=2).map(b"".join), max_size=8))
@settings(max_examples=60)
def test_nothing_is_lost_whatever_the_lines_are(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
):
    folder = tmp_path_factory.mktemp("junk")
    data = b"\n".join([*lines, b'{"prompt": "the one"}'])
    (folder / "in.jsonl").write_bytes(data)
    stored = data.split(b"\n")
    options = PrepareOptions(
        format="rows",
        inputs=(folder / "in.jsonl",),
        output=folder / "out.jsonl",
        format_args={"answer_key": None},
    )
    done = prepare(options)
    written, rejected = lines_of(done.output), lines_of(done.rejected)
    numbers = [number for number, line in enumerate(stored, start=1) if line.strip()]
    assert len(written) + len(rejected) == len(numbers) == done.manifest["num_rows"]
    assert {it["line"] for it in rejected} <= set(numbers)
    assert check_prepared(done.output).good
    assert len(read_rows(DataConfig(train="x", answer_key=None), done.output)) == len(written)
    for found in rejected:
        line = stored[found["line"] - 1].rstrip(b"\r")
        if "row" in found:
            assert found["row"] == json.loads(line.strip())
        else:
            kept = found.get("text", "").encode() or base64.b64decode(found.get("base64", ""))
            assert kept == line


# ---- refusals ------------------------------------------------------------------------------------


def test_nothing_is_written_where_no_row_is_left(tmp_path: Path):
    assert refused(tmp_path, [gsm(" "), "x", gsm("a", "")]) == [
        "{here}/in.jsonl: none of 3 rows is left: bad_json 1, empty_prompt 1, bad_answer 1"
    ]
    assert refused(tmp_path, ["", " "]) == ["{here}/in.jsonl: has no rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_options_are_told_together(tmp_path: Path):
    write(tmp_path / "out.rejected.jsonl", ["x"])
    assert refused(
        tmp_path,
        [gsm("a")],
        overwrite=False,
        max_prompt_tokens=5,
        leak_share=0.0,
        allow_leaks=True,
        inputs=(tmp_path / "inn.jsonl", tmp_path / "out.rejected.jsonl"),
    ) == [
        "--max-prompt-tokens needs --tokenizer",
        "--leak-share is 0.0; needs to be above 0, at most 1",
        "--allow-leaks needs --against",
        "data file {here}/inn.jsonl: no such file; did you mean 'in.jsonl'?",
        "--output {here}/out.jsonl would replace {here}/out.rejected.jsonl, which is read",
        "{here}/out.rejected.jsonl is there already; --overwrite replaces it",
    ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"format": "gsm9k"}, "no data format named 'gsm9k'; did you mean 'gsm8k'?"),
        (
            {"format_args": {"prompt_key": "q"}},
            "format 'gsm8k' takes no argument 'prompt_key'; choices: none",
        ),
        (
            {"format": "rows", "format_args": {"promt_key": "q"}},
            "format 'rows' takes no argument 'promt_key'; did you mean 'prompt_key'?",
        ),
        (
            {"prompt_template": "{prompt!r}"},
            "--prompt-template: '{prompt}' must be a field name in braces and nothing else; write "
            "{{ for a brace",
        ),
        (
            {"check_answers": "length"},
            "reward 'length' has no check of answers (--check-answers)",
        ),
    ],
)
def test_bad_option(tmp_path: Path, options: Any, problem: str):
    assert refused(tmp_path, [gsm("a")], **options) == [problem]


def test_evaluation_sets_must_be_prepared(tmp_path: Path):
    against = write(tmp_path / "set.jsonl", [gsm("a"), "x"])
    assert refused(tmp_path, [gsm("b")], against=(against,)) == [
        "{here}/set.jsonl:1: no field 'id'",
        "{here}/set.jsonl:2: bad JSON: Expecting value (column 1)",
        "{here}/set.jsonl: 2 bad rows; prepare it first",
    ]


def test_a_tokenizer_without_a_template_is_no_fault_of_a_row(
    tmp_path: Path, byte_level_folder: Path
):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_text((byte_level_folder / "tokenizer.json").read_text())
    (problem,) = refused(tmp_path, [gsm("a")], tokenizer=load_tokenizer(bare), chat=True)
    assert problem.startswith("tokenizer {here}/bare has no chat template")


# ---- the schema ----------------------------------------------------------------------------------


def test_check_names_line_and_field(tmp_path: Path):
    fine = {"id": "a", "prompt": "x", "answer": None, "source": "s"}
    path = write(
        tmp_path / "rows.jsonl",
        [
            fine,
            fine,
            "x",
            {"id": 3, "prompt": [], "answer": 4, "source": ""},
            {**fine, "id": "b", "rewards": [], "problem": 1},
            {**fine, "id": "c", "rewards": ["r", "r"], "extra": {"y": 1e999}},
            {**fine, "id": "d", "prompt": [{"role": "system", "content": "only"}]},
            {**fine, "id": "e", "rewards": None, "more": [1]},
            {**fine, "id": "f", "prompt_id": "g"},
        ],
    )
    report = check_prepared(path)
    # Which value it is, Python tells from 3.12 on.
    found = [problem.removeprefix(f"{path}:").removesuffix(": inf") for problem in report.problems]
    assert found == [
        "2: field 'id': 'a' is that of line 1",
        "3: bad JSON: Expecting value (column 1)",
        "4: field 'id' must be a text, is 3 (int)",
        "4: field 'prompt' must be a text or a list of chat messages, is an empty list",
        "4: field 'answer' must be a text or null, is 4 (int)",
        "4: field 'source' must be a text, is an empty str",
        "5: field 'rewards' must be a list of reward names, is an empty list; leave it out where "
        "all rewards apply",
        "5: field 'problem' must be a text, is 1 (int)",
        "6: field 'rewards' names a reward twice: ['r', 'r'] (list)",
        "6: field 'extra' cannot be written as JSON: Out of range float values are not JSON "
        "compliant",
        "7: field 'prompt' is blank",
        "9: field 'prompt_id' would be taken for the id; call it 'id'",
    ]
    assert (report.num_rows, report.sources) == (9, {"s": 2}) and not report.good
