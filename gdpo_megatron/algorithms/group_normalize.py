"""The group stage: deviation from the group's baseline, and its scale (paper eq. 4).

Two passes in float64, never E[x^2] - E[x]^2. The group's minimum is subtracted first: that is exact
for close values, so a large common offset costs no digits and a constant group is exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo_megatron.algorithms.groups import ROUNDING, Groups, without_rounding
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.errors import InputError


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Deviations of [B, K] values and the statistics of their groups.

    Args:
        deviation: [B, K] value minus baseline; 0 where invalid or constant. Where `single`, with
            small_group raw, the value itself.
        count: [P, K] number of valid entries, float64.
        square_sum: [P, K] sum of squared deviations from the mean.
        live: [P, K] bool; the group can tell its members apart by this reward.
        single: [P, K] bool; exactly one valid entry.
    """

    deviation: Tensor
    count: Tensor
    square_sum: Tensor
    live: Tensor
    single: Tensor


def group_statistics(
    values: Tensor, valid: Tensor, groups: Groups, config: AdvantageConfig, names: tuple[str, ...]
) -> GroupStatistics:
    """Centre values [B, K] in their groups.

    Args:
        values: [B, K] float64, finite; 0 where invalid.
        valid: [B, K] bool.
        groups: the partition of the rows.
        config: group_ddof, baseline, constant_test, constant_atol, small_group.
        names: K names for messages.

    Raises:
        InputError: group_ddof leaves a group of two or more no degree of freedom.
    """
    all_valid = bool(valid.all())
    if all_valid:
        count = groups.sizes.to(values.dtype)[:, None].expand(-1, values.shape[1])
        low, high = groups.reduce(values, "min"), groups.reduce(values, "max")
    else:
        count = groups.reduce(valid.to(values.dtype), "sum")
        low = groups.reduce(values.masked_fill(~valid, torch.inf), "min")
        high = groups.reduce(values.masked_fill(~valid, -torch.inf), "max")
        low, high = (torch.where(count > 0, bound, 0.0) for bound in (low, high))
    _check_degrees_of_freedom(count, groups, config.group_ddof, names)

    # One scratch buffer for all [B, K] temporaries: fresh memory costs more than the arithmetic.
    scratch = groups.expand(low)
    deviation = values - scratch
    if not all_valid:
        deviation.masked_fill_(~valid, 0.0)
    mean = groups.reduce(deviation, "sum") / count.clamp(min=1.0)
    deviation -= groups.expand(mean, out=scratch)
    if not all_valid:
        deviation.masked_fill_(~valid, 0.0)
    square_sum = groups.reduce(torch.mul(deviation, deviation, out=scratch), "sum")
    _check_range(square_sum, groups, names)

    if config.constant_test == "max_equals_min":
        live = high - low > config.constant_atol
    else:
        largest = torch.maximum(low.abs(), high.abs())
        live = (square_sum / count.clamp(min=1.0)).sqrt() > ROUNDING * largest
    # A spread so small that its square underflows cannot be scaled.
    live &= square_sum > 0
    if not bool(live.all()):
        deviation.masked_fill_(~groups.expand(live), 0.0)
    single = count == 1
    if config.baseline == "leave_one_out":
        deviation *= groups.expand(leave_one_out_factor(count))
    if config.small_group == "raw" and bool(single.any()):
        deviation = torch.where(groups.expand(single), values, deviation)
    return GroupStatistics(deviation, count, square_sum, live, single)


def leave_one_out_factor(count: Tensor) -> Tensor:
    """Deviation from the others' mean over that from the whole mean: n / (n - 1), 1 for n = 1."""
    return torch.where(count > 1, count / (count - 1.0).clamp(min=1.0), 1.0)


def group_scale(statistics: GroupStatistics, groups: Groups, config: AdvantageConfig) -> Tensor:
    """The factor 1 / (std + eps) of each deviation.

    Args:
        statistics: of the same groups.
        groups: the partition of the rows.
        config: group_ddof, group_eps, group_eps_mode, group_std, baseline.

    Returns:
        [B, K] float64; what it is for a constant group does not matter, its deviations are 0.
    """
    if config.group_std == "others" and config.baseline == "leave_one_out":
        return _scale_by_others(statistics, groups, config)
    freedom = (statistics.count - config.group_ddof).clamp(min=1.0)
    std = (statistics.square_sum / freedom).sqrt()
    # small_group raw: verl gives a lone rollout mean 0 and std 1.
    std = torch.where(statistics.live, std, 1.0)
    return groups.expand((std + config.group_eps).reciprocal())


def _scale_by_others(
    statistics: GroupStatistics, groups: Groups, config: AdvantageConfig
) -> Tensor:
    """Std over the other members (NeMo-RL); a member whose others are constant keeps factor 1."""
    assert config.group_eps_mode == "positive_only", "the config refuses other modes with others"
    count = groups.expand(statistics.count)
    all_squares = groups.expand(statistics.square_sum)
    # The deviation is from the others' mean, n/(n-1) times that from the whole mean.
    own_squares = statistics.deviation.square() * ((count - 1.0) / count.clamp(min=1.0))
    squares = without_rounding(all_squares - own_squares, all_squares).clamp(min=0.0)
    freedom = count - 1.0 - config.group_ddof
    std = (squares / freedom.clamp(min=1.0)).sqrt()
    scaled = (freedom > 0) & (std > 0)
    return torch.where(scaled, (std + config.group_eps).reciprocal(), 1.0)


def _check_degrees_of_freedom(
    count: Tensor, groups: Groups, ddof: int, names: tuple[str, ...]
) -> None:
    short = (count >= 2) & (count <= ddof)
    if bool(short.any()):
        group, reward = (int(i) for i in short.nonzero()[0])
        raise InputError(
            f"advantage.group_ddof is {ddof}, but group {int(groups.ids[group])} has "
            f"{int(count[group, reward])} valid entries of reward '{names[reward]}'; "
            "it must be smaller than that (1 is the unbiased std)"
        )


def _check_range(square_sum: Tensor, groups: Groups, names: tuple[str, ...]) -> None:
    overflow = ~torch.isfinite(square_sum)
    if bool(overflow.any()):
        group, reward = (int(i) for i in overflow.nonzero()[0])
        raise InputError(
            f"reward '{names[reward]}' of group {int(groups.ids[group])} spreads so far that its "
            "variance overflows; scale it down"
        )
