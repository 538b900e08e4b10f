"""Native engine: lean KV-cache decoding of the policy's weights, on any platform.

weights.py holds them fused for decoding, decoder.py runs the model over a KV cache, linear.py
multiplies, sampler.py draws tokens with keyed noise, engine.py schedules requests. Decoding by
Megatron's own module tree costs about four times as much for small models, which is why the forward
pass is written out here; tests prove its logits equal to the policy's.
"""

from gdpo_megatron.rollout.native.engine import NativeEngine

__all__ = ["NativeEngine"]
