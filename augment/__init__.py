"""A handful of labelled images, mixed as diffusion latents, into a better classifier.

An image travels one way, and each stage is a folder of that name. `augment.sources` finds labelled
*images*; `augment.diffusion` encodes them, and `augment.inversion` turns each into a *latent*, kept
in a per-class *bank* (`augment.bank`). A *plan* (`augment.plan`) draws members, Dirichlet *weights*
and a seed; a `Rule` (`augment.centroid`) mixes the members' latents into one *centroid*; the
`Synthesizer` (`augment.synthesis`) samples and decodes it into a new image. The images leave as a
torch Dataset (`SyntheticDataset`), as a pool that a process keeps refilling (`augment.replay`), as
webdataset shards (`augment.shards`), or into a Lightning trainer (`training`). Filling a bank and
writing shards are jobs (`augment.jobs`): units of work that may be killed, resumed and shared by
processes or a cluster. `augment.measure` measures latents and images with the networks of
`augment.networks`; `augment.report` and `augment.explore` show all of it; `augment.core` holds what
knows nothing of images: errors, random generators, files, locks, records.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from augment.bank.bank import LatentBank
    from augment.bank.fill import fill_bank
    from augment.centroid import Rule, walk
    from augment.core.errors import BankMismatch, ImageRejected, UserError
    from augment.diffusion import load_backbone
    from augment.diffusion.sampling import Sampling
    from augment.diffusion.solver import sample
    from augment.inversion import invert
    from augment.plan.mixing import Mixing
    from augment.plan.plan import Plan
    from augment.plan.planner import Planner
    from augment.replay.pool import ReplayPool
    from augment.shards.dataset import Shards, open_shards
    from augment.shards.export import to_webdataset
    from augment.shards.write import write_shards
    from augment.synthesis.dataset import MixedDataset, SyntheticDataset
    from augment.synthesis.synthesizer import Synthesizer

__version__ = "0.1.0"

_HOMES = {
    "LatentBank": "bank.bank",
    "Rule": "centroid",
    "walk": "centroid",
    "MixedDataset": "synthesis.dataset",
    "SyntheticDataset": "synthesis.dataset",
    "load_backbone": "diffusion",
    "Sampling": "diffusion.sampling",
    "sample": "diffusion.solver",
    "BankMismatch": "core.errors",
    "ImageRejected": "core.errors",
    "UserError": "core.errors",
    "to_webdataset": "shards.export",
    "fill_bank": "bank.fill",
    "write_shards": "shards.write",
    "invert": "inversion",
    "Mixing": "plan.mixing",
    "Plan": "plan.plan",
    "Planner": "plan.planner",
    "ReplayPool": "replay.pool",
    "Shards": "shards.dataset",
    "open_shards": "shards.dataset",
    "Synthesizer": "synthesis.synthesizer",
}
"""The modules of the public names."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that the command is there before torch is."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "BankMismatch",
    "ImageRejected",
    "LatentBank",
    "MixedDataset",
    "Mixing",
    "Plan",
    "Planner",
    "ReplayPool",
    "Rule",
    "Sampling",
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
