"""The config recorded in a run folder: complete, valid from there, compared at the next start."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from support.cli_job import Cli, Job

from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.fields import walk
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.run_folder import record_config


def test_it_holds_every_key_and_can_be_run_again_from_there(job: Job, run_cli: Cli):
    (job.folder / "mine.py").write_text("def score(sample):\n    return 1.0\n")
    mine = {"type": "./mine.py:score"}
    job.edit({"rewards": [{"name": "mine", **mine}], "data.eval": "rows.jsonl"})
    job.edit({"eval.rewards": [{"name": "also", **mine}]})
    job.edit({"eval.sets": [{"name": "held", "data": "rows.jsonl", "rewards": ["also"]}]})
    assert run_cli("train", "config.yaml", "--optimizer.lr", "3e-4").code == 0
    recorded = job.folder / "run/config.yaml"
    first, again = load_config(RLConfig, Path("config.yaml")), load_config(RLConfig, recorded)
    for path in ("run_dir", "model.hf_path", "data.train", "data.eval"):
        before, after = asdict(first), asdict(again)
        for name in path.split("."):
            before, after = before[name], after[name]
        assert resolve_path(job.folder, before) == resolve_path(recorded.parent, after)
    assert again.optimizer.lr == 3e-4
    assert again.rewards[0].type == again.eval.rewards[0].type == "../mine.py:score"
    assert again.eval.sets[0].data == "../rows.jsonl"
    data, _ = yaml_text.parse(recorded.read_text())
    for path, _ in walk(RLConfig):
        holder = data
        for name in path.replace("rewards[]", "rewards.0").replace("sets[]", "sets.0").split("."):
            if holder is None:
                break  # an optional section
            holder = holder[int(name)] if isinstance(holder, list) else holder[name]
    # Started again from its own folder: nothing has changed, and nothing moves.
    text = recorded.read_text()
    outcome = run_cli("train", "run/config.yaml", "--nproc", "2")
    assert (outcome.code, outcome.out) == (0, "")
    assert recorded.read_text() == text
    assert sorted(it.name for it in (job.folder / "run").iterdir()) == ["config.yaml"]


def test_what_has_changed_is_told(job: Job, run_cli: Cli):
    assert run_cli("train", "config.yaml").out == ""
    job.edit({"rollout.group_size": 8, "data.shuffle": False})
    outcome = run_cli("train", "config.yaml", "--optimizer.lr", "1e-5")
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "changed since this run was started: data.shuffle: True -> False",
        "changed since this run was started: optimizer.lr: 1e-06 -> 1e-05",
        "changed since this run was started: rollout.group_size: 4 -> 8",
    ]
    # Told once: the new config is the recorded one now.
    assert run_cli("train", "config.yaml", "--optimizer.lr", "1e-5").out == ""


def test_only_the_first_node_records(job: Job, run_cli: Cli):
    nodes = ("--nnodes", "2", "--rdzv-endpoint", "here:1", "--node-rank")
    assert run_cli("train", "config.yaml", *nodes, "1").code == 0
    assert not (job.folder / "run").exists()
    assert run_cli("train", "config.yaml", *nodes, "0").code == 0
    assert (job.folder / "run/config.yaml").is_file()


def test_eval_records_nothing(job: Job, run_cli: Cli):
    job.edit({"data.eval": "rows.jsonl"})
    assert run_cli("eval", "config.yaml").code == 0
    assert not (job.folder / "run").exists()


def test_a_key_that_is_gone_and_one_that_is_new_are_told(tmp_path: Path):
    config = SFTConfig(run_dir="run", model={"hf_path": "m"}, data={"train": "t.jsonl"})
    assert record_config(config, tmp_path) == []
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("seed: 1234", "sead: 1234"))
    assert record_config(config, tmp_path) == [
        "changed since this run was started: sead: 1234 -> None",
        "changed since this run was started: seed: None -> 1234",
    ]


@pytest.mark.parametrize("name", ["a $b", "run: #1", "\u00e9"])
def test_paths_with_special_characters(tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    fields = {"model": {"hf_path": "model"}, "data": {"train": "t.jsonl"}}
    config = SFTConfig(run_dir="../other/run", **fields)
    record_config(config, folder)
    again = load_config(SFTConfig, tmp_path / "other/run/config.yaml")
    assert resolve_path(tmp_path / "other/run", again.model.hf_path) == folder / "model"
    assert resolve_path(tmp_path / "other/run", again.run_dir) == tmp_path / "other/run"
