"""Publishing the policy's weights to the rollout engine."""

from gdpo_megatron.weight_sync.colocated import SyncReport, sync_weights

__all__ = ["SyncReport", "sync_weights"]
