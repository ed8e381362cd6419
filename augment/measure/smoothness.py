r"""How evenly images change along a walk between latents.

ISTD of Guo et al., *Smooth Diffusion*, arXiv 2312.04410, sec. 4.2: two noises a prompt, nine images
between theirs by slerp; the standard deviation of the ten distances of neighbours, over prompts.
Pixels are in [0, 1], which the published values fit (38.63 for Stable Diffusion 1.5).
InterpScore of Ribeiro, *Exploring the latent space of text-to-image diffusion models*, 2023: how
well the images along a walk fit the text.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.walks import walk
from augment.core.rng import normal, rng
from augment.diffusion.backbone import Backbone
from augment.diffusion.solver import sample

STOPS = 11
"""Images of a walk: nine between, at the ratios 0.1 … 0.9, and both ends."""


def istd(walks: Float[Tensor, "p t c h w"]) -> float:
    r"""Compute the interpolation standard deviation; 0 if images change by equal distances.

    It is the population standard deviation of :math:`\|x_{k+1} - x_k\|_2`, averaged over walks.

    Args:
        walks: images in [0, 1] along each walk, (walks, places, C, H, W).
    """
    steps = walks.double().diff(dim=1).flatten(2).norm(dim=2)
    return steps.std(dim=1, correction=0).mean().item()


def walks(
    backbone: Backbone,
    prompts: list[str],
    seed: int = 0,
    mean: Float[Tensor, " latent"] | float = 0.0,
    name: str = "slerp",
    solver: str = "fireflow",
    steps: int = 25,
    guidance: float = 1.0,
) -> Float[Tensor, "p t c h w"]:
    """Sample images along walks between two noises, one walk per prompt.

    Args:
        backbone: the diffusion model.
        prompts: prompt of each walk; may repeat.
        seed: seed of the noises; walk i has the same two noises for every model.
        mean: mean of each latent channel to add to the noise, for models whose last level is not
            quite noise.
        name: name of the walk; see `augment.centroid.walks`.
        solver: see `augment.sample`.
        steps: see `augment.sample`.
        guidance: see `augment.sample`.
    """
    shift = torch.as_tensor(mean).reshape(-1, 1, 1)
    latents = []
    for number in range(len(prompts)):
        a, b = (normal(rng(seed, "noise", number, end), *backbone.latent_shape) for end in (0, 1))
        latents.append(walk(a + shift, b + shift, STOPS, name))
    texts = [text for text in prompts for _ in range(STOPS)]
    images = sample(backbone, torch.cat(latents), texts, solver, steps, guidance=guidance)
    return images.unflatten(0, (len(prompts), STOPS))


def interp_score(images: Float[Tensor, "t d"], text: Float[Tensor, " d"]) -> float:
    """Return the mean of max(100 · cosine, 0) of image features along a walk to a text feature.

    Args:
        images: features of the images, such as from `augment.networks.clip.Clip.images`.
        text: feature of the text by the same model, or a class's mean image feature.
    """
    cosines = torch.cosine_similarity(images.double(), text.double()[None], dim=1)
    return (100 * cosines).clamp_min(0).mean().item()
