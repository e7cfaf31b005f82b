"""vdr: GRPO on DeepSpeed ZeRO-3 that keeps exploring."""

__version__ = "0.1.0"
