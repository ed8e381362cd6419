"""Norms of inverted images in several models.

    python scripts/reproduce/norms.py --quick
    python scripts/reproduce/norms.py --models tiny sd15 tiny-flow.safetensors

Samuel et al., *Norm-guided latent space exploration*, arXiv 2306.08687: noise of D numbers has a
norm near √(D − 1), and seeds of another norm give poor images. Whether inverted images have it in
other models, too, is their next check. ``gaussian`` is a model of normally distributed data of
standard deviation 0.15, whose network is exact. ``DDIM`` asks the network at the level it has, and
``forward_start`` begins with noise.
"""

from pathlib import Path
from typing import Any

import torch
from claims import once, options, record, sized
from judge import load_all, mean, pictures
from torch import Tensor
from tqdm import tqdm

from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.diffusion.process import VariancePreserving
from augment.inversion import inverted, inverter

WAYS = {"published DDIM": "published_ddim", "DDIM": "ddim", "forward_start": "forward_start"}


def open_model(args: Any, name: str, each: int) -> tuple[Backbone, Tensor]:
    """Load a model, and images of its form."""
    if name == "gaussian":
        backbone = GaussianBackbone(0.0, 0.15, VariancePreserving("v"))
        noises = normal(rng(0, "noise"), 10 * each, *backbone.latent_shape)
        return backbone, 0.075 * noises + 0.5
    opened = load_backbone(name)
    return opened, load_all(pictures(args, each)[0], opened)


def main() -> None:
    """Invert, measure, judge."""
    parser = options("Norms of inverted images: arXiv 2306.08687.", "norms")
    parser.add_argument(
        "--models", nargs="+", default=["gaussian", "tiny"], help="gaussian, or as for --backbone"
    )
    args = parser.parse_args()
    each, steps = sized(args, (1, 2), (8, 20), (64, 50))
    rows, found = [], {}
    for name in tqdm(args.models, "models"):
        backbone, images = open_model(args, name, each)
        dim = torch.Size(backbone.latent_shape).numel()
        noises = normal(rng(1, "noise"), len(images), *backbone.latent_shape)
        row = {"model": Path(name).stem, "D": str(dim)}
        latents = {"noise": noises}
        for label, way in WAYS.items():
            stem = f"{backbone.fingerprint['weights'][:8]}-{way}-{len(images)}-{steps}"
            latents[label] = once(
                args.out / f"{stem}.safetensors",
                lambda way=way, model=backbone, real=images: {
                    "l": inverted(inverter(way, steps=steps), model, real, None)["latents"]
                },
            )["l"]
        for label, points in latents.items():
            norms = points.flatten(1).double().norm(dim=1) / (dim - 1) ** 0.5
            row[label] = f"{norms.mean():.3f}, sd {norms.std():.3f}"
            if label == "published DDIM":
                found[row["model"]] = mean(norms)
        rows.append(row)
    title = f"norms over √(D − 1) of {10 * each} images, inverted in {steps} steps"
    record(args, title, rows, {"na-models": found})


if __name__ == "__main__":
    main()
