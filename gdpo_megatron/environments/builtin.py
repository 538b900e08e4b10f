"""The built-in environments; importing this module registers them."""

from gdpo_megatron.environments.tools import environment

__all__ = ["environment"]
