"""Interpolation rules: how the latents of several images become one. torch only."""

from augment.centroid.means import MEANS
from augment.centroid.norms import NORMS
from augment.centroid.paths import WALKS, walk
from augment.centroid.rule import Rule

__all__ = ["MEANS", "NORMS", "WALKS", "Rule", "walk"]
