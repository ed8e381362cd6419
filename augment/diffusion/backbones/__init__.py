"""Backbones: to add one, add a file here and a line to `augment.diffusion.BACKBONES`."""
