"""Rollout engines: base.py is the protocol, native/ the engine that decodes the policy's weights."""
