"""Paths and environment variables in a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from gdpo_megatron.config.fields import walk
from gdpo_megatron.config.paths import (
    FILE_SPEC_KEYS,
    PATH_KEYS,
    escape_variables,
    expand_variables,
    resolve_path,
)
from gdpo_megatron.config.schema import RLConfig


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("plain/path", "plain/path"),
        ("$HERE/x", "/data/x"),
        ("${HERE}/x", "/data/x"),
        ("${HERE:-/else}/x", "/data/x"),
        ("${NOT_SET:-../../shared}/x", "../../shared/x"),
        ("${EMPTY:-fallback}", "fallback"),
        ("${NOT_SET:-}x", "x"),
        ("a$EMPTY-b", "a-b"),
        ("$$HERE", "$HERE"),
    ],
)
def test_variables_are_filled_in(text: str, expanded: str):
    assert expand_variables(text, {"HERE": "/data", "EMPTY": ""}) == expanded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOT_SET/x", "environment variable NOT_SET is not set"),
        ("${NOT_SET}", "environment variable NOT_SET is not set"),
        ("${NOT_SET-x}", "write \\$NAME"),
        ("cost$", "write \\$NAME"),
        ("$1", "write \\$NAME"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        expand_variables(text, {})


def test_escaped_text_comes_back():
    assert expand_variables(escape_variables("a$b${c}$$"), {}) == "a$b${c}$$"


def test_resolve_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = tmp_path / "examples" / "x"
    base.mkdir(parents=True)
    assert resolve_path(base, "../../data/a.jsonl") == tmp_path.resolve() / "data" / "a.jsonl"
    assert resolve_path(base, "/abs/a.jsonl") == Path("/abs/a.jsonl")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert resolve_path(base, "~/m") == Path("/home/somebody/m")
    monkeypatch.chdir(tmp_path)
    assert resolve_path(Path("examples/x"), "m") == base.resolve() / "m"


def test_a_link_keeps_its_own_suffix(tmp_path: Path):
    (tmp_path / "blob").write_text("")
    (tmp_path / "rows.parquet").symlink_to(tmp_path / "blob")
    assert resolve_path(tmp_path, "rows.parquet").name == "rows.parquet"


def test_the_path_keys_exist_in_the_schema():
    known = {path for path, _ in walk(RLConfig)}
    assert set(PATH_KEYS) | set(FILE_SPEC_KEYS) <= known
