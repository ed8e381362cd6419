"""Smooth Diffusion: training a backbone to be smooth."""
