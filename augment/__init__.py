"""A handful of labelled images, mixed as diffusion latents, into a better classifier.

A picture travels one way. ``encode`` and ``invert`` turn each real *image* into a *latent* and
keep it in a per-class *bank* (`LatentBank`); a *plan* throws the dice: members, Dirichlet
*weights*, seed; a `Rule` turns the members' latents into one *centroid*; ``sample`` and
``decode`` turn that into a new image, which a torch Dataset (`SyntheticDataset`), a folder or a
Lightning trainer (`training`) takes from there. `augment.measure` says what a bank's latents are
like and what a rule will make of their bias; `walk` goes from one latent to another. Each stage
is one module of that name; a folder is a place to add a file: `augment.centroid` rules,
`augment.diffusion` backbones, `augment.inversion` inversions, `augment.sources` where labelled
images come from.
"""

from augment.bank import LatentBank
from augment.centroid import Rule, walk
from augment.dataset import MixedDataset, SyntheticDataset
from augment.diffusion import load_backbone
from augment.diffusion.solver import sample
from augment.errors import BankMismatch, ImageRejected, UserError
from augment.inversion import invert
from augment.plan import Plan, Planner
from augment.synthesis import Synthesizer

__version__ = "0.1.0"

__all__ = [
    "BankMismatch",
    "ImageRejected",
    "LatentBank",
    "MixedDataset",
    "Plan",
    "Planner",
    "Rule",
    "Synthesizer",
    "SyntheticDataset",
    "UserError",
    "invert",
    "load_backbone",
    "sample",
    "walk",
]
