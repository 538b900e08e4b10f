"""Model families by Hugging Face `model_type`; importing registers them."""

from gdpo_megatron.conversion.families import llama

__all__ = ["llama"]
