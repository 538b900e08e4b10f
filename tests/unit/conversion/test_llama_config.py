"""From a Llama config.json to an architecture: both generations of keys, and what is refused.

transformers writes the rotary keys in two forms; frequencies are compared with its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gdpo_megatron.conversion.architecture import (
    Llama3RopeScaling,
    ModelArchitecture,
)
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.families.llama import LAYER_ROWS
from gdpo_megatron.errors import InputError

Write = Callable[..., Path]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_all_fields(write_config: Write) -> None:
    assert load_architecture(write_config()) == ModelArchitecture(
        family="llama",
        num_layers=3,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=19,
        max_position_embeddings=32,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        initializer_range=0.02,
        layer_rows=LAYER_ROWS,
    )


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"head_dim": 10}, {"head_dim": 10}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"tie_word_embeddings": None}, {}),
        ({"initializer_range": 0.5}, {"initializer_range": 0.5}),
        ({"rope_theta": 500000}, {"rope_theta": 500000.0}),
        ({"attention_bias": False, "mlp_bias": False}, {}),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 7.0}),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, {"rope_theta": 7.0}),
    ],
)
def test_keys_and_defaults(
    changes: dict[str, Any], fields: dict[str, Any], write_config: Write, arch: ModelArchitecture
) -> None:
    assert load_architecture(write_config(**changes)) == replace(arch, **fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3", "rope_type": None}},
        {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_parameters": LLAMA3},
    ],
    ids=["old", "old, type", "transformers 5", "theta at the top"],
)
def test_llama3_scaling_in_all_forms(
    changes: dict[str, Any], write_config: Write, arch: ModelArchitecture
) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        if key in changes:
            changes[key] = {k: v for k, v in changes[key].items() if v is not None}
    scaling = Llama3RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    expected = replace(arch, rope_theta=500000.0, rope_scaling=scaling)
    assert load_architecture(write_config(**changes)) == expected


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 500000.0, LLAMA3),  # Llama 3.1
        (64, 500000.0, {**LLAMA3, "factor": 32.0}),  # Llama 3.2
        (16, 500.0, {**LLAMA3, "factor": 4.0, "original_max_position_embeddings": 16}),
        (8, 10000.0, {**LLAMA3, "low_freq_factor": 2.0, "original_max_position_embeddings": 64}),
    ],
)
def test_llama3_frequencies_are_those_of_transformers(
    head_dim: int, theta: float, scaling: dict[str, Any], write_config: Write
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = write_config(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    ours = load_architecture(folder).inverse_frequencies()
    config = LlamaConfig.from_pretrained(folder)
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    assert ours.dtype == torch.float32 and ours.shape == (head_dim // 2,)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    unscaled = 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    assert not torch.equal(ours, unscaled), "the scaling does nothing here"


def test_plain_frequencies_by_hand(write_config: Write) -> None:
    """theta^(-2i/d) for d = 4, theta = 10000: 1 and 1/100."""
    frequencies = load_architecture(write_config()).inverse_frequencies()
    assert frequencies.tolist() == pytest.approx([1.0, 0.01], rel=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "'attention_bias' is True; attention biases are not supported"),
        ({"mlp_bias": True}, "'mlp_bias' is True; MLP biases are not supported"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; only silu is supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope type 'yarn' is not supported; choices: default, llama3",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not"),
        (
            {"rope_scaling": {**LLAMA3, "factor": "8"}},
            "rope scaling: 'factor' must be a number, got '8'",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'low_freq_factor' must be a number, got None",
        ),
        ({"rope_theta": None}, "no 'rope_theta', at the top or in 'rope_parameters'"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5; "),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor' is 0.5; ",
        ),
        ({"vocab_size": None}, "'vocab_size' must be a number, got None"),
        ({"num_hidden_layers": 2.5}, "'num_hidden_layers' must be an integer, got 2.5"),
        ({"num_attention_heads": True}, "'num_attention_heads' must be a number, got True"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be positive, got 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value"),
        ({"model_type": "gpt2"}, "no model family named 'gpt2'; "),
        ({"model_type": "lama"}, "no model family named 'lama'; did you mean 'llama'?"),
        ({"model_type": None}, "no model_type"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, write_config: Write) -> None:
    folder = write_config(**changes)
    with pytest.raises(InputError) as caught:
        load_architecture(folder)
    text = str(caught.value)
    assert message in text and "\n" not in text
    if "model family" not in message:
        assert str(folder / "config.json") in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ('{\n"a": 1,\n}', "config.json, line 3: not JSON"),
        ("[]", "config.json: not a JSON object"),
    ],
)
def test_unreadable(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_architecture(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^no folder .*/absent"):
        load_architecture(tmp_path / "absent")


def test_stories(stories_folder: Path) -> None:
    """A published model: five layers, tied, 512 tokens."""
    arch = load_architecture(stories_folder)
    assert (arch.num_layers, arch.hidden_size, arch.intermediate_size) == (5, 64, 172)
    assert (arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim) == (8, 4, 8)
    assert arch.vocab_size == 512 and arch.tie_word_embeddings
