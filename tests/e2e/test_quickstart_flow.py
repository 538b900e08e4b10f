"""From random weights to an exported model, on two ranks: sft, train, eval, generate.

Eight steps teach no format, so nothing is said about rewards rising: examples/quickstart does that.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import read_jsonl, succeed

from gdpo_megatron.config import yaml_text
from gdpo_megatron.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.distributed

REWARDS = ("format", "correctness")


@pytest.fixture(scope="module")
def trained(quickstart: Path, sft: Path) -> tuple[Path, str]:
    """(run folder, output) of three steps of GDPO, the last of them evaluated."""
    config = {
        "run_dir": "gdpo",
        "model": {"hf_path": "sft/hf", "max_sequence_length": 160},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "rewards": [{"name": name, "type": f"tool_call_{name}"} for name in REWARDS],
        "rollout": {"num_prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 48},
        "eval": {
            "max_completion_tokens": 32,
            "num_prompts": 8,
            "samples_per_prompt": 2,
            "correct": {"reward": "correctness", "gte": -3.0},
            "sets": [{"name": "again", "data": "eval.jsonl", "num_prompts": 3}],
        },
        "train": {"num_steps": 3, "num_minibatches_per_step": 2, "eval_interval": 3},
        "optimizer": {"lr": 1e-4},
        "loss": {"kl_coef": 0.01},
        "profiling": {"tool": "torch", "ranks": [1]},
    }
    (quickstart / "gdpo.yaml").write_text(yaml_text.dump(config))
    return quickstart / "gdpo", succeed("train", quickstart / "gdpo.yaml", "--nproc", "2")


def load(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def test_sft_learns_and_exports(sft: Path):
    metrics = read_jsonl(sft / "metrics.jsonl")
    assert [it["step"] for it in metrics] == list(range(1, 9))
    assert all(math.isfinite(value) for it in metrics for value in it.values())
    # Uniform guessing costs log(1024) = 6.9.
    assert metrics[0]["sft/loss"] == pytest.approx(6.9, abs=0.5)
    assert metrics[-1]["sft/loss"] < 4.5
    assert load(sft / "hf").config.vocab_size <= 1024
    assert (sft / "checkpoints/step_00000008/run.json").is_file()


def test_training_logs_every_step(trained: tuple[Path, str]):
    run_dir, output = trained
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    assert [it["step"] for it in metrics] == [1, 2, 3]
    for it in metrics:
        assert not [name for name, value in it.items() if value is None or not math.isfinite(value)]
        assert it["completion/mean_tokens"] > 0 and it["optimizer/grad_norm"] > 0
        assert -3 <= it["reward/correctness/mean"] <= 3 and 0 <= it["reward/format/mean"] <= 1
    assert [it["run/policy_version"] for it in metrics] == [0, 2, 4]
    # What a reward counts itself is there where it counted.
    names = [{name for name in it if not re.match("reward/[^/]+/num_", name)} for it in metrics]
    assert names[0] == names[1]
    assert {name for name in names[2] - names[1] if not name.startswith(("time/", "memory/"))} == {
        f"{prefix}/{name}"
        for prefix in ("eval", "eval/again")
        for name in (
            *("mean_tokens", "truncated_share", "invalid_share", "pass@1"),
            *(f"{reward}/{it}" for reward in REWARDS for it in ("mean", "standard_error")),
        )
    }
    assert all(f"step {n}/3" in output for n in (1, 2, 3))
    assert list((run_dir / "tensorboard").iterdir())


def test_the_plan_is_shown_beside_the_first_step(trained: tuple[Path, str]):
    _, output = trained
    assert output.count("the plan beside the first update: rank ") == 1
    error = dict(re.findall(r"^  (\w+) .* ([+-][0-9.]+)%$", output, re.M))
    assert [error[it] for it in ("parameters", "gradients", "optimizer")] == ["+0.0"] * 3
    assert abs(float(error["activations"])) < 10
    timed = re.findall(r"^  (\w+) +[0-9.]+ +[0-9.]+ +[+-][0-9]+%$", output, re.M)
    assert timed == ["weight_sync", "rollout", "logprobs", "update"]


def test_one_step_of_one_rank_was_profiled(trained: tuple[Path, str]):
    folder = trained[0] / "profile"
    assert sorted(it.name for it in folder.iterdir()) == [
        "steps_2-2_rank1.json.gz", "steps_2-2_rank1.txt",
    ]  # fmt: skip
    table = (folder / "steps_2-2_rank1.txt").read_text()
    phases = ("weight_sync", "rollout", "exchange", "logprobs", "update")
    assert all(re.search(rf"^ +{name} ", table, re.M) for name in phases)
    assert not re.search("^ +checkpoint ", table, re.M)


def test_sampled_rollouts_can_be_read(trained: tuple[Path, str]):
    run_dir, _ = trained
    files = sorted((run_dir / "rollouts").iterdir())
    assert [it.name for it in files] == [f"step_{n:06d}.jsonl" for n in (1, 2, 3)]
    for step, path in enumerate(files, start=1):
        rows = read_jsonl(path)
        assert len(rows) == 4 and len({it["prompt_id"] for it in rows}) == 1
        for it in rows:
            assert it["step"] == step and it["policy_version"] == 2 * (step - 1)
            assert it["rewards"].keys() == set(REWARDS) and "unscored" not in it
            assert it["finish_reason"] in ("stop", "length") and 0 < it["num_tokens"] <= 48


def test_the_export_says_the_same_in_transformers_and_in_generate(
    trained: tuple[Path, str], quickstart: Path
):
    folder = trained[0] / "hf"
    model, before = load(folder), load(quickstart / "sft/hf")
    moved = [
        name
        for (name, new), old in zip(
            model.state_dict().items(), before.state_dict().values(), strict=True
        )
        if not torch.equal(new, old)
    ]
    assert len(moved) == len(model.state_dict()), "some tensor was not trained, or not exported"
    prompts = [it["prompt"] for it in read_jsonl(quickstart / "eval.jsonl")[:2]]
    tokenizer = load_tokenizer(folder)
    expected = ""
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32
        )
        expected += f"{prompt}{tokenizer.decode(done[0, ids.shape[1] :].tolist())}\n\n"
    arguments = [it for prompt in prompts for it in ("--prompt", prompt)]
    assert succeed("generate", folder, *arguments, "--max-completion-tokens", "32") == expected


def test_eval_of_the_export_finds_what_the_last_step_found(
    trained: tuple[Path, str], quickstart: Path
):
    """On one rank instead of two: the same noise, the same completions, the same means."""
    last = read_jsonl(trained[0] / "metrics.jsonl")[-1]
    succeed("eval", quickstart / "gdpo.yaml", "--model.hf_path", "gdpo/hf", "--run_dir", "eval")
    folder = quickstart / "eval/eval/hf"
    sets = json.loads((folder / "results.json").read_text())["sets"]
    assert sets["again"]["num_prompts"] == 3
    # Every correctness is at least -3: all are right.
    assert sets["again"]["quantities"]["pass@1"]["mean"] == last["eval/again/pass@1"] == 1.0
    found = sets["data.eval"]
    assert (found["num_prompts"], found["samples_per_prompt"]) == (8, 2)
    assert found["quantities"]["mean_tokens"]["mean"] == last["eval/mean_tokens"]
    for name in REWARDS:
        it = found["quantities"][f"reward/{name}"]
        assert it["mean"] == pytest.approx(last[f"eval/{name}/mean"], abs=1e-12)
        error = last[f"eval/{name}/standard_error"]
        assert it["standard_error"] == pytest.approx(error, abs=1e-12)
    during = trained[0] / "eval/step_00000003"
    for name in ("results.json", "data.eval.jsonl"):
        assert (during / name).is_file()
    samples = read_jsonl(folder / "data.eval.jsonl")
    assert samples == read_jsonl(during / "data.eval.jsonl")
    assert len(samples) == 16
