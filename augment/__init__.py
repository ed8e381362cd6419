"""A handful of labelled images, mixed as diffusion latents, into a better classifier.

A picture travels one way. ``encode`` and ``invert`` turn each real *image* into a *latent* and
keep it in a per-class *bank* (`LatentBank`); a *plan* throws the dice: members, Dirichlet
*weights*, seed; a `Rule` turns the members' latents into one *centroid*; ``sample`` and
``decode`` turn that into a new image, which a torch Dataset (`SyntheticDataset`), a pool that a
process keeps refilling (`ReplayPool`), webdataset shards (`write_shards`, `open_shards`) or a
Lightning trainer (`training`) takes from there. Filling a bank and writing shards are jobs
(`augment.jobs`): units of work that may be killed, moved and shared by processes or a cluster.
`augment.measure` says what a bank's latents are like and what a rule will make of their bias;
`augment.refine` brings a centroid nearer to its class, `augment.report` and `augment.explore` show
all of it; `walk` goes from one latent to another. Each stage is one module of that name; a folder
is a place to add a file: `augment.centroid` rules, `augment.diffusion` backbones,
`augment.inversion` inversions, `augment.sources` where labelled images come from,
`augment.networks` what images are seen by, `augment.filters` which synthetic images to keep,
`augment.commands` what may be typed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from augment.bank import LatentBank
    from augment.centroid import Rule, walk
    from augment.dataset import MixedDataset, SyntheticDataset
    from augment.diffusion import load_backbone
    from augment.diffusion.solver import sample
    from augment.errors import BankMismatch, ImageRejected, UserError
    from augment.export import to_webdataset
    from augment.fill import fill_bank
    from augment.generate import write_shards
    from augment.inversion import invert
    from augment.plan import Plan, Planner
    from augment.replay import ReplayPool
    from augment.shards import Shards, open_shards
    from augment.synthesis import Synthesizer

__version__ = "0.1.0"

HOMES = {
    "LatentBank": "bank",
    "Rule": "centroid",
    "walk": "centroid",
    "MixedDataset": "dataset",
    "SyntheticDataset": "dataset",
    "load_backbone": "diffusion",
    "sample": "diffusion.solver",
    "BankMismatch": "errors",
    "ImageRejected": "errors",
    "UserError": "errors",
    "to_webdataset": "export",
    "fill_bank": "fill",
    "write_shards": "generate",
    "invert": "inversion",
    "Plan": "plan",
    "Planner": "plan",
    "ReplayPool": "replay",
    "Shards": "shards",
    "open_shards": "shards",
    "Synthesizer": "synthesis",
}
"""The modules of the public names."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that the command is there before torch is."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "BankMismatch",
    "ImageRejected",
    "LatentBank",
    "MixedDataset",
    "Plan",
    "Planner",
    "ReplayPool",
    "Rule",
    "Shards",
    "Synthesizer",
    "SyntheticDataset",
    "UserError",
    "fill_bank",
    "invert",
    "load_backbone",
    "open_shards",
    "sample",
    "to_webdataset",
    "walk",
    "write_shards",
]
