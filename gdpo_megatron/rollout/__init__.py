"""Rollout engines: base.py is the protocol, native/ decodes the policy's weights."""
