r"""Prior preservation: images of a coarse word, so that an adaptation does not forget it.

Ruiz et al., *DreamBooth*, CVPR 2023, arXiv 2208.12242, eq. 2. Trained on a few birds alone, a
network makes every bird one of these few. So with each batch of the user's images goes one of
images that the unadapted model made of a prompt such as *a photo of a bird*:

.. math:: L = L_\text{own} + \lambda\,L_\text{prior},

both the mean squared error of `augment.training.adapt.module.denoising_loss`, each with levels and
noise of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from augment.core.errors import UserError
from augment.core.files import remember, write_bytes
from augment.core.progress import Progress
from augment.core.rng import normal, rng
from augment.diffusion import Backbone
from augment.diffusion.solver import sample
from augment.shards.dataset import encode
from augment.sources import Source
from augment.sources.images import SUFFIXES
from augment.training.checks import at_least

PRIOR = "prior"
"""Folder of a run with the images that were made for it."""

_TOGETHER = 8  # images of a batch, which is made whole or again, so that its bits stay the same


class PriorImages(Source):
    """The images in a folder, of no class."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        names = [path.name for path in paths if path.suffix.lower() in SUFFIXES]
        self.ids = {PRIOR: [name for name in names if not name.startswith(".")]}
        if not names:
            raise UserError(
                f"expected images in {folder} for prior_images, got none; name a folder with image "
                "files right in it, or a number of images to make"
            )


@dataclass(frozen=True)
class Prior:
    """What is preserved, and how much.

    Attributes:
        prompt: of the images.
        weight: λ.
        images: number of images to make, or a folder of given ones.

    Raises:
        UserError: a negative weight, or no image.
    """

    prompt: str
    weight: float = 1.0
    images: int | str = 100

    def __post_init__(self) -> None:
        """Refuse numbers that are out of their ranges."""
        at_least(0, prior_weight=self.weight)
        at_least(1, prior_images=self.images if isinstance(self.images, int) else None)

    @property
    def given(self) -> bool:
        """Whether the images are the user's."""
        return isinstance(self.images, str)

    def source(self, backbone: Backbone, out: Path, seed: int) -> Source:
        """Return the images, of which missing ones are made first.

        Args:
            backbone: the model, not adapted yet.
            out: folder of the run, whose sub-folder `PRIOR` gets them.
            seed: of their noises.

        Raises:
            UserError: a folder without images, or with images made of other settings.
        """
        if isinstance(self.images, str):
            return PriorImages(Path(self.images)).readable(name=PRIOR)
        folder = out / PRIOR
        made_by = {"backbone": backbone.fingerprint, "prompt": self.prompt, "seed": seed}
        remember(folder / "prior.json", made_by, "--out")
        names = [f"{number:05d}.png" for number in range(self.images)]
        shape = backbone.latent_shape
        for first in Progress(range(0, len(names), _TOGETHER), "prior images", delay=2):
            part = names[first : first + _TOGETHER]
            if all((folder / name).exists() for name in part):
                continue
            numbers = range(first, first + len(part))
            noises = torch.stack([normal(rng(seed, "noise", k), *shape) for k in numbers])
            steps, guidance = backbone.usage.steps, backbone.usage.guidance
            images = sample(backbone, noises, self.prompt, steps=steps, guidance=guidance)
            for name, image in zip(part, images.cpu(), strict=True):
                write_bytes(folder / name, encode(image, "png"))
        return PriorImages(folder)
