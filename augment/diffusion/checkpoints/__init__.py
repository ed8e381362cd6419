"""Checkpoints of diffusion models: found, checked, loaded, and their LoRA."""
