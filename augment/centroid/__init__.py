"""Interpolation rules: how the latents of several images become one. torch only."""

from augment.centroid.means import MEANS
from augment.centroid.norms import NORMS
from augment.centroid.rule import Rule
from augment.centroid.walks import WALKS, slide, tour, walk

__all__ = ["MEANS", "NORMS", "WALKS", "Rule", "slide", "tour", "walk"]
