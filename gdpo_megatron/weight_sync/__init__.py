"""Publishing the policy's weights to the rollout engine, and proving that they arrived."""

from gdpo_megatron.weight_sync.canary import Canary, tolerance_of
from gdpo_megatron.weight_sync.colocated import SyncReport, WeightSync
from gdpo_megatron.weight_sync.proof import SyncFault

__all__ = ["Canary", "SyncFault", "SyncReport", "WeightSync", "tolerance_of"]
