"""Configs for clusters: each passes `validate` and `plan` for its world, with memory to spare.

Models are folders of the published shapes without weights, data one row. Not covered: that anything
runs on a GPU, and that plans are right there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.published_models import save_published_model

from gdpo_megatron.cli import main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from cluster_table import DOCUMENT, MARKS, Cluster, clusters, table_lines  # noqa: E402

CLUSTERS = clusters()
MODELS = {
    "qwen2.5_1.5b": "Qwen2.5-1.5B-Instruct",
    "qwen2.5_3b": "Qwen2.5-3B-Instruct",
    "qwen2.5_7b": "Qwen2.5-7B-Instruct",
    "qwen3_30b_a3b": "Qwen3-30B-A3B-Instruct-2507",
    "llama3.1_70b": "Llama-3.1-70B-Instruct",
}
SPARE = 0.08
"""Of the memory that may be filled."""


@pytest.fixture(scope="module", autouse=True)
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models and data where the configs look for them."""
    folder = tmp_path_factory.mktemp("clusters")
    for name in MODELS.values():
        save_published_model(folder / "models" / name, name)
    (folder / "data/math").mkdir(parents=True)
    for name, question in (("deepscaler", "2+3?"), ("math500", "2+4?")):
        row = {"id": name, "source": name, "answer": "5"}
        row["prompt"] = [{"role": "user", "content": question}]  # pyright: ignore
        (folder / f"data/math/{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDPO_MODELS", str(folder / "models"))
        patch.setenv("GDPO_DATA", str(folder / "data"))
        yield


def _command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code  # pyright: ignore[reportReturnType]


def test_every_model_and_size_is_there():
    assert {it.path.stem.rsplit("_", 1)[0] for it in CLUSTERS} == MODELS.keys()
    assert {1, 2, 8, 16} <= {it.num_nodes for it in CLUSTERS}
    assert {it.gpus_per_node for it in CLUSTERS} == {8}


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda it: it.path.stem)
def test_cluster_is_valid_and_fits(cluster: Cluster, capsys: pytest.CaptureFixture[str]):
    where = [str(cluster.path), "--world-size", str(cluster.world_size), "--gpu", "h100-80"]
    assert _command("validate", *where) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert f"/{MODELS[cluster.path.stem.rsplit('_', 1)[0]]}: " in told  # its tokenizer
    assert f"sbatch --nodes={cluster.num_nodes} --gpus-per-node=8 " in told
    assert "slow" not in told  # no group of TP and no engine crosses nodes
    plan = cluster.plan()
    assert plan.memory.peak_bytes <= (1 - SPARE) * plan.limit_bytes
    assert plan.job.config.run_dir.endswith(f"runs/clusters/{cluster.path.stem}")
    assert cluster.path.read_text().startswith("# ")  # why it looks so


def test_what_does_not_fit_is_seen(capsys: pytest.CaptureFixture[str]):
    (cluster,) = (it for it in CLUSTERS if it.path.stem == "llama3.1_70b_8x8")
    where = [str(cluster.path), "--world-size", "64", "--gpu", "h100-80"]
    assert _command("plan", *where) == 0
    assert "64 x h100-80, 8 a node: TP4 x PP4 x DP4; fits" in capsys.readouterr().out
    assert _command("plan", *where, "--parallel.pipeline_model_parallel_size", "1") == 1
    assert "does not fit" in capsys.readouterr().out
    assert _command("validate", *where, "--rollout.tensor_parallel_size", "3") == 2
    told = capsys.readouterr().err
    assert "rollout.tensor_parallel_size 3 does not divide the model's 64 attention heads" in told


def test_the_page_has_the_plan():
    found = MARKS.search(DOCUMENT.read_text())
    assert found is not None
    table = found[0].split("\n", 1)[1].rsplit("\n", 1)[0]
    assert table == "\n".join(table_lines()), "run: python tools/cluster_table.py"
    for cluster in CLUSTERS:
        assert f"`{cluster.path.stem}`" in table
