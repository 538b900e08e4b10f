"""LoRA from the command line, on two ranks: sft, train with a KL term, what they leave behind.

Left out: that it learns (8 steps teach nothing), and layouts (tests/distributed/test_lora.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.jobs import read_jsonl, succeed
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gdpo_megatron.config import yaml_text

pytestmark = [pytest.mark.distributed, pytest.mark.full]

LORA = {"rank": 4, "alpha": 8}
REWARD = """def count(sample):
    return sum(map(ord, sample.completion)) % 7
"""


@pytest.fixture(scope="module")
def tuned(quickstart: Path, sft: Path) -> Path:
    """The run folder of three steps of LoRA SFT on the warm-started model, tensor-parallel."""
    config = {
        "run_dir": "lora_sft",
        "model": {"hf_path": "sft/hf", "max_sequence_length": 160, "lora": LORA},
        "data": {"train": "sft.jsonl"},
        "parallel": {"tensor_model_parallel_size": 2},
        "train": {"num_steps": 3, "global_batch_size": 16},
        "optimizer": {"lr": 3e-3},
        "logging": {"tensorboard": False},
    }
    (quickstart / "lora_sft.yaml").write_text(yaml_text.dump(config))
    succeed("sft", quickstart / "lora_sft.yaml", "--nproc", "2")
    return quickstart / "lora_sft"


@pytest.fixture(scope="module")
def trained(quickstart: Path, sft: Path) -> Path:
    """The run folder of three steps of LoRA GDPO, resumed after the second."""
    config = {
        "run_dir": "lora_gdpo",
        "model": {"hf_path": "sft/hf", "max_sequence_length": 160, "lora": LORA},
        "data": {"train": "train.jsonl"},
        "rewards": [{"name": "varied", "type": "./varied.py:count"}],
        "rollout": {"num_prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 32},
        "train": {"num_steps": 2, "num_minibatches_per_step": 2},
        "optimizer": {"lr": 1e-2},
        "loss": {"kl_coef": 0.01},
        "logging": {"tensorboard": False},
    }
    (quickstart / "varied.py").write_text(REWARD)
    (quickstart / "lora_gdpo.yaml").write_text(yaml_text.dump(config))
    job = ("train", quickstart / "lora_gdpo.yaml", "--nproc", "2")
    succeed(*job, "--checkpoint.export_hf", "false")
    assert not (quickstart / "lora_gdpo/hf").exists()
    succeed(*job, "--train.num_steps", "3")
    return quickstart / "lora_gdpo"


def own_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The parameters in a run's checkpoint but for adapters."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
        and key.startswith(("embedding.", "decoder.", "output_layer."))
        and ".lora." not in key
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


@pytest.mark.parametrize("run", ["tuned", "trained"])
def test_only_adapters_are_trained(run: str, request: pytest.FixtureRequest, sft: Path) -> None:
    run_dir: Path = request.getfixturevalue(run)
    before = own_weights(sft / "checkpoints/step_00000008")
    after = own_weights(run_dir / "checkpoints/step_00000003")
    assert after.keys() == before.keys() and len(after) >= 8
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    base, merged = (load_file(path / "hf/model.safetensors") for path in (sft, run_dir))
    moved = [name for name in base if not torch.equal(base[name], merged[name])]
    assert moved == [name for name in base if name.endswith("_proj.weight")]
    names = ("config.json", "tokenizer.json", "manifest.json", "model.safetensors")
    assert {it.name for it in (run_dir / "hf").iterdir()} >= set(names)


@pytest.mark.parametrize("run", ["tuned", "trained"])
def test_peft_makes_the_export_of_the_base(
    run: str, request: pytest.FixtureRequest, quickstart: Path, sft: Path
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    run_dir: Path = request.getfixturevalue(run)
    files = {it.name for it in (run_dir / "peft").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    # The base model is found through adapter_config.json.
    adapted = AutoPeftModelForCausalLM.from_pretrained(run_dir / "peft", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32)
    tokens = torch.arange(60).unsqueeze(0)
    with torch.no_grad():
        a, b = adapted(tokens).logits, merged(tokens).logits
    assert float(((a - b).abs() / b.abs().clamp(min=1)).max()) <= 5e-6


def test_metrics(tuned: Path, trained: Path) -> None:
    supervised, rl = (read_jsonl(run / "metrics.jsonl") for run in (tuned, trained))
    assert [it["step"] for it in supervised] == [it["step"] for it in rl] == [1, 2, 3]
    for it in (*supervised, *rl):
        assert not [name for name, x in it.items() if x is None or not math.isfinite(x)]
        assert it["optimizer/grad_norm"] > 0
    assert supervised[-1]["sft/loss"] < supervised[0]["sft/loss"]
    # The adapters are 0 at first: the policy is its own reference, then it moves away.
    kl = [it["update/kl"] for it in rl]
    assert kl[0] < kl[2]
