"""Saving and resuming runs."""

from gdpo_megatron.checkpoint.manager import CheckpointManager, goes_on_from, saved_after

__all__ = ["CheckpointManager", "goes_on_from", "saved_after"]
