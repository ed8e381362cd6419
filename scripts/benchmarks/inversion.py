"""Inversions on the embedded backbone, of embedded pictures.

DDIM inversion against diffusers' ``DDIMInverseScheduler``, which asks the network at the level it
goes to (`augment.inversion.ddim` tells why ours does not): two maps, so the images that come back
are compared. Null-text inversion of a batch against one image at a time, by our own code and by the
published loop, whose pivot is that of its paper.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from augment import invert, load_backbone, sample
from augment.diffusion import Backbone
from augment.inversion import inverted, inverter
from augment.sources import Folder
from augment.sources.fashion import COARSE, write_fashion
from benchmarks.duel import Duel, Kept
from benchmarks.plain import NullText, Plain, psnr

GUIDANCE = 5.0
BAR = ("speed", 4.0)


def pictures(count: int, only: str = "") -> tuple[Tensor, list[str]]:
    """Embedded pictures and their prompts; ``only`` those of a prompt."""
    with tempfile.TemporaryDirectory() as folder:
        source = Folder(write_fashion(folder, "shots", list(range(8))))
        ids = [name for name, _ in source.samples if COARSE[name.split("/")[0]].startswith(only)]
        ids = ids[:: max(len(ids) // count, 1)][:count]
        images = torch.stack([source.load(name, 1, 32) for name in ids])
    return images, [COARSE[name.split("/")[0]] for name in ids]


def suite(args: argparse.Namespace) -> Iterator[Duel]:
    """DDIM, then null-text."""
    backbone = load_backbone("tiny", device=args.device)
    yield ddim(args, backbone)
    yield from null_text(args, backbone)


def ddim(args: argparse.Namespace, backbone: Backbone) -> Duel:
    """A batch, and how well it comes back."""
    plain, steps = Plain(args.device), 2 if args.quick else 50
    images, prompts = pictures(2 if args.quick else 64)
    ours = Kept(partial(invert, backbone, images, prompts, "ddim", steps))
    theirs = Kept(partial(plain.invert, images, prompts, steps))

    def quality() -> str:
        mine = sample(backbone, ours.found, prompts, "ddim", steps)
        yours = plain.sample(theirs.found, prompts, steps)
        return f"images come back at {psnr(mine, images):.1f} dB, theirs {psnr(yours, images):.1f}"

    return Duel(
        name=f"invert, DDIM {steps}, batch {len(images)}",
        ours=ours,
        theirs=theirs,
        opponent="diffusers: UNet2DModel and DDIMInverseScheduler in a loop",
        quality=quality,
        count=len(images),
    )


def null_text(args: argparse.Namespace, backbone: Backbone) -> Iterator[Duel]:
    """A batch at once, ours one by one, and the published loop."""
    steps, inner = (2, 1) if args.quick else (10, 10)
    images, prompts = pictures(2 if args.quick else 16, "top")
    run = inverter("null_text", steps=steps, inner=inner)
    batch = Kept(partial(inverted, run, backbone, images, prompts, GUIDANCE, len(images)))
    alone = Kept(partial(inverted, run, backbone, images, prompts, GUIDANCE, 1))
    loop = NullText(Plain(args.device), steps, inner, GUIDANCE)

    def one_by_one() -> list[tuple[Tensor, list[Tensor]]]:
        each = zip(images, prompts, strict=True)
        return [loop.invert(image[None], prompt) for image, prompt in each]

    published = Kept(one_by_one)

    def back(found: dict[str, Tensor]) -> float:
        nulls = found["nulls"][found["null_rows"]]
        told = found["latents"], prompts, "ddim", steps, GUIDANCE
        return mse(sample(backbone, *told, nulls=nulls), images)

    def against_ours() -> str:
        mine, yours = batch.found, alone.found
        apart = (mine["nulls"].float() - yours["nulls"].float()).abs().max().item()
        errors = f"error² of the images {back(mine):.2g} against {back(yours):.2g}"
        return f"max difference of embeddings {apart:.1g}; {errors}"

    def against_theirs() -> str:
        each = zip(published.found, prompts, strict=True)
        yours = torch.cat([loop.sample(latent, name, nulls) for (latent, nulls), name in each])
        return f"error² of the images {back(batch.found):.2g} against {mse(yours, images):.2g}"

    name = f"null-text, {steps} steps of {inner}, batch {len(images)}"
    more = {"count": len(images), "bar": BAR}
    yield Duel(name, batch, alone, "ours, one image at a time", against_ours, **more)
    theirs = "the published loop over diffusers' UNet2DModel, one image at a time"
    yield Duel(name, batch, published, theirs, against_theirs, **more)


def mse(found: Tensor, wanted: Tensor) -> float:
    """Mean square difference of images."""
    return (found.cpu() - wanted.cpu()).square().mean().item()
