"""The `launch` section: how a job of several nodes starts, and when its ranks give up waiting."""

from __future__ import annotations

from gdpo_megatron.config.section import NonNegativeFloat, PositiveFloat, section


@section
class LaunchConfig:
    """Starting ranks on several nodes, and noticing that some of them are gone."""

    health_check: bool = True
    """Before the model is built, compare nodes (devices, memory, clocks, disk, versions, config)
    and measure the network between them. Not done on a single node."""

    min_bandwidth_gb_per_s: NonNegativeFloat | None = None
    """Bus bandwidth of an all-reduce, in 10^9 bytes a second, that each node and each pair of nodes
    must reach; null takes the platform's, see docs/launching.md; 0 only reports."""

    node_timeout_seconds: PositiveFloat = 60.0
    """A job of several nodes ends when one of them has not been heard of for so long."""

    collective_timeout_seconds: PositiveFloat = 1800.0
    """A rank ends when it has waited for others for so long."""
