"""README and docs/certify.md say what the committed certificates say."""

from __future__ import annotations

from pathlib import Path

import pytest

from gdpo_megatron.certify import pages
from gdpo_megatron.certify.checks import CHECKS

ROOT = Path(__file__).resolve().parents[3]
CERTIFICATES = pages.read_certificates(ROOT / "docs/certificates")


@pytest.mark.parametrize(
    ("page", "lines"), [("README.md", pages.summary), ("docs/certify.md", pages.numbers)]
)
def test_pages_are_made_from_the_certificates(page: str, lines: object) -> None:
    assert callable(lines)
    text = (ROOT / page).read_text()
    assert pages.fill(text, list(lines(CERTIFICATES))) == text, "run tools/write_docs.py"


def test_the_committed_certificate_of_a_cpu_is_of_all_checks_and_nothing_failed() -> None:
    certificate = CERTIFICATES["cpu"]
    assert [it["check"] for it in certificate["checks"]] == [it.name for it in CHECKS]
    assert certificate["counts"]["fail"] == 0 and certificate["counts"]["pass"] >= 8
    assert certificate["machine"]["platform"] == "cpu" and certificate["machine"]["gpus"] == []


def test_a_column_says_what_was_executed() -> None:
    lines = list(pages.summary(CERTIFICATES))
    (row,) = [it for it in lines if it.startswith("| `logits` ")]
    assert "| pass, " in row and row.endswith("| not executed |")
    (row,) = [it for it in lines if it.startswith("| `logits_te` ")]
    assert row.endswith("| cannot run | not executed |")


def test_every_check_is_in_the_page() -> None:
    text = (ROOT / "docs/certify.md").read_text()
    assert [it.name for it in CHECKS if f"| `{it.name}` |" not in text] == []


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        pages.fill("a page", [])
    assert pages.fill(f"a\n{pages.BEGIN}\nold\n{pages.END}\nb", ["new"]) == (
        f"a\n{pages.BEGIN}\nnew\n{pages.END}\nb"
    )
