"""A model's shape as Hugging Face's config.json gives it, checked once.

Everything that builds or reads weights starts from a `ModelArchitecture`: the Megatron model, the
native engine, the expected tensor names of a checkpoint. A family is a function from the config to
this record, which carries the family's table of tensors (families/, tables.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdpo_megatron.conversion.tables import QKV_BIAS, QUERY_NORM, LayerRow
from gdpo_megatron.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 and later (transformers `_compute_llama3_parameters`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """Experts in place of the MLP of every layer.

    Args:
        num_experts: E.
        intermediate_size: columns of one expert.
        top_k: experts that each token goes to.
        normalize_top_k: the weights of these add up to 1.
    """

    num_experts: int
    intermediate_size: int
    top_k: int
    normalize_top_k: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArchitecture:
    """Shape of a decoder-only transformer with RMSNorm, rotary positions and a gated MLP."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tie_word_embeddings: bool
    initializer_range: float
    layer_rows: tuple[LayerRow, ...]
    """The family's table: the parameters of one layer."""
    moe: MixtureOfExperts | None = None
    sliding_window: int | None = None
    """Longer sequences would be attended to in part, which is not built."""

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return QKV_BIAS in self.layer_rows

    @property
    def has_qk_norm(self) -> bool:
        """Whether each query and key head is normalised before it is rotated."""
        return QUERY_NORM in self.layer_rows

    @property
    def mlp_columns(self) -> int:
        """Columns of the MLP, or of one expert: what TP ranks share."""
        return self.moe.intermediate_size if self.moe else self.intermediate_size

    def size_of(self, letter: str) -> int:
        """The size that a letter of a table stands for (tables.py)."""
        return {
            "h": self.hidden_size,
            "f": self.intermediate_size,
            "q": self.num_attention_heads * self.head_dim,
            "k": self.num_key_value_heads * self.head_dim,
            "d": self.head_dim,
            "E": self.moe.num_experts if self.moe else 0,
            "e": self.moe.intermediate_size if self.moe else 0,
        }[letter]

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding: the same for every TP size that divides 64."""
        multiple = math.lcm(64, tensor_parallel_size)
        return -(-self.vocab_size // multiple) * multiple

    def inverse_frequencies(self) -> torch.Tensor:
        """Rotary inverse frequencies, float32 [head_dim / 2], with the family's scaling applied."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        inv_freq = 1.0 / (self.rope_theta**exponents)
        scaling = self.rope_scaling
        if scaling is None:
            return inv_freq
        wavelength = 2 * math.pi / inv_freq
        low = scaling.original_max_position_embeddings / scaling.low_freq_factor
        high = scaling.original_max_position_embeddings / scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings / wavelength
        smooth = turns - scaling.low_freq_factor
        smooth /= scaling.high_freq_factor - scaling.low_freq_factor
        blended = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
        scaled = torch.where(wavelength > low, inv_freq / scaling.factor, blended)
        return torch.where(wavelength < high, inv_freq, scaled)


class NoModel(InputError):
    """A path leads to no model, or to none that has what is asked for."""


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face folder; InputError names what is missing."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise NoModel(f"no folder {folder}")
    if not path.is_file():
        raise NoModel(f"{folder} has no config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object")
    return config


def read_json(path: Path) -> Any:
    """Parse a JSON file of a model folder; InputError names the line of an error."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error


class ConfigReader:
    """Typed access to a config.json; collects nothing, raises at the first bad key.

    A default is what transformers takes where the key is absent: old checkpoints leave keys out.
    """

    def __init__(self, config: Mapping[str, Any], source: str):
        self.config = config
        self.source = source

    def number(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InputError(f"{self.source}: '{key}' must be a number, got {value!r}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A number of things: an integer, at least 1."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise InputError(f"{self.source}: '{key}' must be an integer, got {value!r}")
        if value < 1:
            raise InputError(f"{self.source}: '{key}' must be positive, got {value!r}")
        return value

    def integer_or_null(self, key: str, default: int | None) -> int | None:
        """Like `integer`, but null is a value of its own: only an absent key has the default."""
        if key in self.config:
            return None if self.config[key] is None else self.integer(key)
        return default

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"{self.source}: '{key}' must be true or false, got {value!r}")
        return value

    def refuse(self, key: str, allowed: Any, reason: str) -> None:
        """Raise when `key` is set to anything but `allowed`; null is not set."""
        value = self.config.get(key)
        if value is not None and value != allowed:
            raise InputError(f"{self.source}: '{key}' is {value!r}; {reason}")

    def rope(self) -> tuple[float, Mapping[str, Any]]:
        """Rotary base and scaling, from the old keys or from transformers 5's `rope_parameters`."""
        parameters = self.config.get("rope_parameters") or {}
        theta = parameters.get("rope_theta", self.config.get("rope_theta"))
        if theta is None:
            raise InputError(f"{self.source}: no 'rope_theta', at the top or in 'rope_parameters'")
        scaling = parameters if parameters else self.config.get("rope_scaling") or {}
        return float(theta), scaling
