"""Backbones: to add one, add a file here and a line to `augment.diffusion.BACKBONES`."""

__all__: list[str] = []
