"""Completions on disk: what a kill leaves at any byte is cut off, and nothing whole is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from gdpo_megatron.errors import InputError
from gdpo_megatron.evaluation.store import SetStore

IDENTITY = {"data": {"sha256": "abc"}, "sampling": {"temperature": 0.6, "stop": []}, "seed": 1}
CHUNKS = [[{"prompt": 0, "text": "\u00e9\n"}, {"prompt": 1, "text": "b"}], [{"prompt": 2}]]
EVENTS = {"right": {"no_answer": 2}}


def fill(folder: Path, num_chunks: int = 2) -> SetStore:
    store = SetStore(folder, "aime")
    assert store.open(IDENTITY) == 0
    for number, records in enumerate(CHUNKS[:num_chunks]):
        store.append(records, num_prompts=2 + number, events=EVENTS)
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_gives_back_what_was_written(tmp_path: Path):
    fill(tmp_path)
    again = SetStore(tmp_path, "aime")
    assert again.open(IDENTITY) == 3
    assert list(again.records()) == CHUNKS[0] + CHUNKS[1]
    assert again.events() == {"right": {"no_answer": 4}}


def test_a_kill_at_any_byte_loses_the_chunk_and_no_more(tmp_path: Path):
    whole = tmp_path / "whole"
    fill(whole)
    files = contents(whole)
    first = tmp_path / "first"
    fill(first, num_chunks=1)
    before = contents(first)
    samples, progress = "aime.jsonl", "aime.progress.jsonl"
    states = [
        (files[samples][:size], before[progress])
        for size in range(len(before[samples]), len(files[samples]) + 1)
    ]
    states += [
        (files[samples], files[progress][:size])
        for size in range(len(before[progress]), len(files[progress]))
    ]
    for number, (torn_samples, torn_progress) in enumerate(states):
        folder = tmp_path / f"torn_{number}"
        folder.mkdir()
        (folder / samples).write_bytes(torn_samples)
        (folder / progress).write_bytes(torn_progress)
        store = SetStore(folder, "aime")
        assert store.open(IDENTITY) == 2
        store.append(CHUNKS[1], num_prompts=3, events=EVENTS)
        assert contents(folder) == files
    assert len(states) > 50


def test_a_header_that_is_torn_is_none(tmp_path: Path):
    fill(tmp_path, num_chunks=1)
    (tmp_path / "aime.progress.jsonl").write_text('{"data": {"sha')
    assert SetStore(tmp_path, "aime").open(IDENTITY) == 0
    assert (tmp_path / "aime.jsonl").read_bytes() == b""


def test_what_was_made_with_something_else_is_refused(tmp_path: Path):
    fill(tmp_path)
    files = contents(tmp_path)
    now = {"data": {"sha256": "abc"}, "sampling": {"temperature": 1.0, "top_k": 5}, "seed": 1}
    (problem,) = SetStore(tmp_path, "aime").problems(now)
    assert problem == (
        f"{tmp_path}/aime.jsonl was made with sampling.temperature 0.6, now 1.0; sampling.top_k "
        f"not there, now 5; sampling.stop [], now not there. Give this evaluation another "
        f"eval.label, or remove {tmp_path}"
    )
    with pytest.raises(InputError, match="Give this evaluation another"):
        SetStore(tmp_path, "aime").open(now)
    assert contents(tmp_path) == files
    # What is not known yet is no difference.
    assert SetStore(tmp_path, "aime").problems({"seed": 1}) == []
    # In training a step is evaluated anew.
    assert SetStore(tmp_path, "aime").open(now, goes_on=False) == 0


def test_missing_completions_are_told(tmp_path: Path):
    fill(tmp_path)
    (tmp_path / "aime.jsonl").unlink()
    with pytest.raises(InputError, match="is shorter than"):
        SetStore(tmp_path, "aime").open(IDENTITY)
