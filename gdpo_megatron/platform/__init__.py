"""Where device and backend names are at home; see base.py."""

from gdpo_megatron.platform.base import Platform, detect_platform

__all__ = ["Platform", "detect_platform"]
