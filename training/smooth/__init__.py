"""Smooth Diffusion: training a backbone to be smooth."""

__all__: list[str] = []
