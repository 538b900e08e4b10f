"""The worked example of docs/families.md, as it stands there, against transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import drain, greedy, native_engine, request

from gdpo_megatron.certify.family_models import reference_model, save_model
from gdpo_megatron.conversion.families import families, load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes

DOCS = Path(__file__).parents[3] / "docs" / "families.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "families.add" in block]
    monkeypatch.setattr(families, "_entries", dict(families._entries))
    exec(compile(code, str(DOCS), "exec"), {})


@pytest.mark.parametrize("biased", [True, False])
def test_worked_example(biased: bool, example: None, tmp_path: Path) -> None:
    config: dict[str, Any] = {"head_dim": 24, "attention_bias": biased}
    save_model(tmp_path, "seed_oss", **config, attention_dropout=0.0, residual_dropout=0.0)
    arch = load_architecture(tmp_path)
    assert arch.has_qkv_bias == biased
    assert len(hf_shapes(arch)) == 3 + 2 * (9 + 3 * biased)
    prompt = (40, 41, 42, 7, 9)
    engine = native_engine(tmp_path)
    engine.submit([request(0, prompt)], greedy(16))
    done = drain(engine)
    expected = reference_model(tmp_path).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert done[0].completion.token_ids == tuple(expected[0, len(prompt) :].tolist())
