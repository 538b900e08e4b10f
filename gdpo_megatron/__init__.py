"""GDPO post-training on Megatron-Core. Importing the package starts nothing heavy."""

__version__ = "0.1.0"
