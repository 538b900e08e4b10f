"""Saving and resuming runs."""

from gdpo_megatron.checkpoint.manager import CheckpointManager, saved_after

__all__ = ["CheckpointManager", "saved_after"]
