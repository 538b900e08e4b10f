"""Write the pages of docs/ that are made from the code: python tools/write_docs.py."""

from __future__ import annotations

from pathlib import Path

import gdpo_megatron.step_metrics  # noqa: F401 (declares the metrics of the update)
from gdpo_megatron.config.help import configuration_page
from gdpo_megatron.observability.metrics import metrics_page

DOCS = Path(__file__).parents[1] / "docs"

if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(configuration_page(), encoding="utf-8")
    (DOCS / "metrics.md").write_text(metrics_page(), encoding="utf-8")
