"""Checkpoints of diffusion models: found, checked, loaded, and their LoRA."""

__all__: list[str] = []
