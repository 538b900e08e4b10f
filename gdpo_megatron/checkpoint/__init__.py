"""Saving and resuming runs."""

from gdpo_megatron.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager"]
