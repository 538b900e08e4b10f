"""The reference of the keys is complete, right and current."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

import pytest

from gdpo_megatron.config.fields import Key, show, walk
from gdpo_megatron.config.help import configuration_page, describe, to_markdown
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.config.section import PositiveInt, UnitFloat, section

REPOSITORY = Path(__file__).parents[3]


@section
class Inner:
    """The inner part,
    on two lines."""

    share: UnitFloat = 0.5
    """Between 0 and 1."""


@section
class Derived(Inner):
    """Inherits a key with its text."""

    size: PositiveInt | None = None
    """A | B, in <units>."""


@section
class Outer:
    """All."""

    path: str
    """Where."""

    many: tuple[Inner, ...]
    """Several."""

    maybe: Inner | None = None
    """Perhaps."""

    inner: Derived = field(default_factory=Derived)
    words: tuple[str, ...] = ("a",)
    """Some words."""

    kind: Literal["x", "y"] = "x"
    """One."""


def test_every_key_in_words():
    told = {path: (key.allowed, key.doc) for path, key in walk(Outer) if key.section is None}
    assert told == {
        "path": ("string", "Where."),
        "many[].share": ("float from 0 to 1", "Between 0 and 1."),
        "maybe.share": ("float from 0 to 1", "Between 0 and 1."),
        "inner.share": ("float from 0 to 1", "Between 0 and 1."),
        "inner.size": ("int > 0, or null", "A | B, in <units>."),
        "words": ("list of strings", "Some words."),
        "kind": ("one of x, y", "One."),
    }


def test_help_for_a_terminal():
    assert (
        describe(Outer, width=50)
        == """\
All.

  --path  string; required
      Where.
  --words  list of strings; default ["a"]
      Some words.
  --kind  one of x, y; default x
      One.

many[]: Several.

  --many.NAME.share  float from 0 to 1; default
        0.5
      Between 0 and 1.

maybe: Perhaps. May be null, the default.

  --maybe.share  float from 0 to 1; default 0.5
      Between 0 and 1.

inner: Inherits a key with its text.

  --inner.share  float from 0 to 1; default 0.5
      Between 0 and 1.
  --inner.size  int > 0, or null; default null
      A | B, in <units>.
"""
    )


def test_markdown_escapes_what_a_table_cannot_hold():
    assert r"| `size` | int > 0, or null | default null | A \| B, in &lt;units>. |" in to_markdown(
        Outer
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-06, "1e-6"),
        (1e20, "1e20"),
        (0.9, "0.9"),
        (float("inf"), ".inf"),
        (None, "null"),
        ((0.9, 0.95), "[0.9, 0.95]"),
        ("a\nb", '"a\\nb"'),
        ("x" * 80, '"' + "x" * 56 + "..."),
    ],
)
def test_values_are_shown_as_a_file_would_say_them(value: object, text: str):
    assert show(value) == text


@pytest.mark.parametrize("root", [RLConfig, SFTConfig])
def test_no_key_is_without_documentation(root: type):
    undocumented = [path for path, key in walk(root) if not key.doc.endswith(".")]
    assert undocumented == []


def test_the_list_of_keys_grows_only_on_purpose():
    def line(root: type, path: str, key: Key) -> str:
        return f"{root.__name__} {path}" + ("" if key.section is None else " (section)")

    current = [line(root, path, key) for root in (RLConfig, SFTConfig) for path, key in walk(root)]
    snapshot = Path(__file__).with_name("config_keys.txt")
    assert current == snapshot.read_text().splitlines(), (
        f"the config keys changed; if that is wanted, write them to {snapshot.name}"
    )


def test_the_page_is_current():
    page = REPOSITORY / "docs" / "configuration.md"
    assert page.read_text() == configuration_page(), "run: python tools/write_docs.py"
