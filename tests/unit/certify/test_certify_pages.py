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


def certificate(**status: str) -> dict[str, object]:
    checks = [{"check": name, "status": it, "seconds": 7.4} for name, it in status.items()]
    machine = {"gpus": [], "cores": 2, "packages": {"torch": "2"}}
    return {"checks": checks, "machine": machine, "num_devices": 1, "date": "2026-01-02"}


def test_what_cannot_run_in_one_environment_may_in_another() -> None:
    made_up = {
        "cpu": certificate(logits="pass", weight_sync_vllm="cannot run", fp8="fail"),
        "cpu_vllm": certificate(logits="fail", weight_sync_vllm="pass"),
        "gpu": certificate(logits="cannot run"),
    }
    rows = {it.split("`")[1]: it for it in pages.summary(made_up) if it.startswith("| `")}
    ends = {name: [it.strip() for it in row.split("|")[-3:-1]] for name, row in rows.items()}
    assert ends["logits"] == ["pass, 7 s", "cannot run"]
    assert ends["weight_sync_vllm"] == ["pass, 7 s", "not executed"]
    assert ends["fp8"] == ["FAIL", "not executed"]


def test_every_check_is_in_the_page() -> None:
    text = (ROOT / "docs/certify.md").read_text()
    assert [it.name for it in CHECKS if f"| `{it.name}` |" not in text] == []


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        pages.fill("a page", [])
    assert pages.fill(f"a\n{pages.BEGIN}\nold\n{pages.END}\nb", ["new"]) == (
        f"a\n{pages.BEGIN}\nnew\n{pages.END}\nb"
    )
