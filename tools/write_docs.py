"""Write what is made from code and certificates in README and docs/: python tools/write_docs.py."""

from __future__ import annotations

from pathlib import Path

import gdpo_megatron.step_metrics  # noqa: F401 (declares the metrics of the update)
from gdpo_megatron.certify import pages
from gdpo_megatron.config.help import configuration_page
from gdpo_megatron.observability.metrics import metrics_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def main() -> None:
    """Entry point."""
    (DOCS / "configuration.md").write_text(configuration_page(), encoding="utf-8")
    (DOCS / "metrics.md").write_text(metrics_page(), encoding="utf-8")
    certificates = pages.read_certificates(DOCS / "certificates")
    for path, lines in (
        (ROOT / "README.md", pages.summary(certificates)),
        (DOCS / "certify.md", pages.numbers(certificates)),
    ):
        filled = pages.fill(path.read_text(encoding="utf-8"), list(lines))
        path.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
