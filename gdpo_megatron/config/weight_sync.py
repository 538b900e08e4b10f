"""The `weight_sync` section: how weights reach the rollout engine, and how that is proven."""

from __future__ import annotations

from dataclasses import field

from pydantic import model_validator

from gdpo_megatron.config.section import NonNegativeInt, PositiveFloat, PositiveInt, section


@section
class CanaryConfig:
    """Fixed prompts, completed right after a sync: the engine's log-probs against the policy's."""

    interval: NonNegativeInt = 50
    """Syncs from one canary to the next; the first two are always followed by one. 0 never."""

    num_prompts: PositiveInt = 4
    """The first so many prompts of data.train, or all where there are fewer."""

    num_tokens: PositiveInt = 16
    """Tokens of each completion."""

    max_logprob_diff: PositiveFloat | None = None
    """Largest difference of a token's log-prob, in nats; null takes what the engine's number
    format makes of it (docs/rollout.md)."""

    mean_logprob_diff: PositiveFloat | None = None
    """Largest mean of these differences over all tokens; null as above."""

    @model_validator(mode="after")
    def _check_bounds(self) -> CanaryConfig:
        largest, mean = self.max_logprob_diff, self.mean_logprob_diff
        if largest is not None and mean is not None and mean > largest:
            raise ValueError(
                f"mean_logprob_diff {mean:g} is above max_logprob_diff {largest:g}, and a mean is "
                "never above the largest; lower it, or leave it out"
            )
        return self


@section
class WeightSyncConfig:
    """Weights from the policy to the rollout engine, and the proof that they arrived.

    That every tensor comes once, in order, with its shape, dtype and finite values is checked in
    every sync.
    """

    bucket_mb: PositiveInt = 256
    """MiB of whole tensors that are gathered at a time; a larger tensor goes alone."""

    checksum_interval: NonNegativeInt = 50
    """Syncs from one comparison of every tensor's checksum to the next; the first two are always
    compared. 0 never."""

    canary: CanaryConfig = field(default_factory=CanaryConfig)
