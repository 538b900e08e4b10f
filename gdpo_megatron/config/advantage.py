"""The `advantage` section: every choice on which GDPO implementations disagree, by name.

A preset is a bundle of values for the keys below; keys given beside it win. `PRESETS` is the whole
of what is known about each published variant, and docs/algorithms.md says how they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Any, Literal, cast

from pydantic import model_validator
from pydantic_core import ArgsKwargs

from gdpo_megatron.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
    section,
)
from gdpo_megatron.errors import InputError, did_you_mean

PresetName = Literal["paper", "nvlabs_trl", "nvlabs_verl", "verl", "trl", "nemo_rl", "ms_swift"]

_VERL: Mapping[str, Any] = MappingProxyType(
    {
        "batch_norm": "token",
        "batch_eps": 1e-8,
        "batch_eps_mode": "var_rsqrt",
        "missing": "error",
        "small_group": "raw",
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # arXiv 2601.05242, eq. 4, 7 and 6; it names no eps, so that is ours.
        "paper": {},
        # NVlabs/GDPO trl-0.18.0-gdpo: NaN becomes 0 before normalising; one reward is plain GRPO.
        "nvlabs_trl": {
            "group_eps": 1e-4,
            "batch_eps": 1e-4,
            "missing": "zero",
            "unscored_row": "count",
            "batch_norm_min_rewards": 2,
        },
        # NVlabs/GDPO verl-GDPO: two fixed rewards without weights; otherwise as verl.
        "nvlabs_verl": _VERL,
        # verl core_algos.compute_gdpo_outcome_advantage: whitening over tokens.
        "verl": _VERL,
        # TRL multi_objective_aggregation="normalize_then_sum".
        "trl": {"group_eps": 1e-4, "batch_eps": 1e-4},
        # NeMo-RL GDPOAdvantageEstimator as its recipes set it (no leave-one-out).
        "nemo_rl": {
            "group_eps_mode": "positive_only",
            "constant_test": "std_positive",
            "group_std": "others",
            "batch_eps": 0.0,
            "missing": "error",
        },
        # ms-swift scale_rewards="gdpo": a row without any score counts as a 0 in eq. 6.
        "ms_swift": {"group_eps": 1e-8, "batch_eps": 1e-8, "unscored_row": "count"},
    }
)

# GRPO ends with the group stage. Everything else goes through eq. 6 unless told otherwise.
_BATCH_NORM_OF = {"grpo": "none", "grpo_no_std": "none"}


@section
class GD2POConfig:
    """Conflict filter of estimator gd2po (arXiv 2606.16771)."""

    mode: Literal["hard", "snr"] = "hard"
    """hard drops every rollout whose rewards disagree in sign; snr only the undecided ones."""

    snr_threshold: UnitFloat = 0.8
    """With snr: drop a conflicting rollout when |sum A_k| / sum |A_k| is below this (scripts of the
    authors: 0.8, default of their code: 0.2)."""

    scale_by_kept: bool = True
    """Multiply each group by its kept share (the paper; optional there with snr)."""


@section
class AdvantageConfig:
    """How rewards become advantages."""

    preset: PresetName = "paper"
    """Bundle of values that fills the keys not given here: a published variant."""

    estimator: str = "gdpo"
    """gdpo, grpo, grpo_no_std, gd2po, another registered name, or ./file.py:function."""

    weights: Mapping[str, float] | None = None
    """Reward weights by name; null means 1.0 each. In a run they come from rewards[].weight."""

    group_ddof: NonNegativeInt = 1
    """Divisor of the group variance is n - group_ddof: 1 unbiased, 0 as in Megatron-LM."""

    group_eps: NonNegativeFloat = 1e-6
    """Added to the std of each group."""

    group_eps_mode: Literal["std_plus", "positive_only"] = "std_plus"
    """std_plus divides by std + eps; positive_only does so where std > 0 and elsewhere leaves the
    deviation as it is, which differs only for group_std others (NeMo-RL)."""

    group_std: Literal["all", "others"] = "all"
    """Std over the whole group; or, with baseline leave_one_out, over the other members (NeMo-RL;
    with baseline mean it is all either way). others needs group_eps_mode positive_only, since a
    lone success leaves others with std 0."""

    constant_test: Literal["max_equals_min", "std_positive"] = "max_equals_min"
    """What makes a group constant, hence A_k = 0: max - min <= constant_atol over its valid
    entries; or a std within rounding of zero (1e-12 of the largest value)."""

    constant_atol: NonNegativeFloat = 0.0
    """Spread up to which max_equals_min calls a group constant; for noisy rewards."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted: the group's mean, or the mean of the other members."""

    small_group: Literal["zero", "raw"] = "zero"
    """A reward with one valid entry in a group: 0, or the raw reward (mean 0, std 1; verl)."""

    missing: Literal["exclude", "zero", "error"] = "exclude"
    """An invalid entry: out of the statistics and contributing 0; a reward of 0 (NVlabs TRL);
    or an error that names it."""

    unscored_row: Literal["exclude", "count"] = "exclude"
    """A row without any valid reward: advantage 0, out of the batch statistics and of the loss;
    or counted like every other row (ms-swift)."""

    batch_norm: Literal["sequence", "token", "none"] = "sequence"
    """Eq. 6 over rollouts, over their tokens (verl), or not at all. If not given: none for grpo and
    grpo_no_std, which have no such stage; sequence for all others."""

    batch_norm_min_rewards: PositiveInt = 1
    """Eq. 6 only with at least this many rewards (NVlabs TRL: 2)."""

    batch_ddof: NonNegativeInt = 1
    """Divisor of the batch variance is N - batch_ddof."""

    batch_eps: NonNegativeFloat = 1e-6
    """Added to the std of the batch (paper eq. 6)."""

    batch_eps_mode: Literal["std_plus", "var_rsqrt"] = "std_plus"
    """std_plus divides by std + eps; var_rsqrt multiplies with rsqrt(var + eps) and adds eps to the
    counts too (verl)."""

    batch_std_floor: PositiveFloat | None = None
    """Lower bound of the batch std: keeps a few live groups from being blown up; null is off."""

    advantage_cap: PositiveFloat | None = None
    """Upper bound of |advantage| after the batch stage; null is off."""

    gd2po: GD2POConfig = field(default_factory=GD2POConfig)
    """Options of estimator gd2po."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        given: Any = (data.kwargs or {}) if isinstance(data, ArgsKwargs) else data
        if not isinstance(given, dict):
            return data
        given = cast(dict[str, Any], given)
        filled = {**PRESETS.get(str(given.get("preset", "paper")), {}), **given}
        if "batch_norm" not in given and filled.get("estimator") in _BATCH_NORM_OF:
            filled["batch_norm"] = _BATCH_NORM_OF[filled["estimator"]]
        return ArgsKwargs(data.args, filled) if isinstance(data, ArgsKwargs) else filled

    @model_validator(mode="after")
    def _check_combinations(self) -> AdvantageConfig:
        if self.group_std == "others" and self.group_eps_mode != "positive_only":
            raise ValueError(
                "group_std 'others' needs group_eps_mode 'positive_only': the others of a lone "
                "success have std 0, and dividing by eps alone makes it 1/eps times too large"
            )
        if self.constant_atol > 0 and self.constant_test != "max_equals_min":
            raise ValueError(
                f"constant_atol {self.constant_atol} belongs to constant_test 'max_equals_min', "
                f"and constant_test is '{self.constant_test}'"
            )
        return self

    @classmethod
    def from_preset(
        cls, name: str, weights: Mapping[str, float] | None = None, **overrides: Any
    ) -> AdvantageConfig:
        """The configuration of a published variant.

        Args:
            name: a key of PRESETS.
            weights: reward weights by name.
            overrides: further keys; they win over the preset.

        Raises:
            InputError: no such preset.
        """
        if name not in PRESETS:
            raise InputError(f"no advantage preset '{name}'; {did_you_mean(name, PRESETS)}")
        return cls(preset=name, weights=weights, **overrides)  # pyright: ignore[reportArgumentType]
