"""Inversions on the embedded backbone, of embedded images.

DDIM inversion is compared with diffusers' ``DDIMInverseScheduler``, which asks the network at the
level it goes to (`augment.inversion.ddim` says why ours does not): two maps, so the quality is the
error of reconstruction. Null-text inversion of a batch is compared with one image at a time,
by our own code and by the published loop, whose pivot is that of its paper.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from augment import invert, load_backbone, sample
from augment.diffusion import Backbone
from augment.diffusion.conditions import Schedule
from augment.inversion import inverted, inverter
from augment.measure.reconstruction import reconstruction
from augment.sources import Folder
from augment.sources.fashion import COARSE, write_fashion
from benchmarks.paired import Comparison, Keep
from benchmarks.plain import NullText, Plain

GUIDANCE = 5.0


def embedded(count: int, only: str = "") -> tuple[Tensor, list[str]]:
    """Load embedded images and their prompts, those whose prompt begins with ``only``."""
    with tempfile.TemporaryDirectory() as folder:
        source = Folder(write_fashion(folder, "shots", list(range(8))))
        ids = [name for name, _ in source.samples if COARSE[name.split("/")[0]].startswith(only)]
        ids = ids[:: max(len(ids) // count, 1)][:count]
        images = torch.stack([source.load(name, 1, 32) for name in ids])
    return images, [COARSE[name.split("/")[0]] for name in ids]


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare DDIM, then null-text."""
    backbone = load_backbone("tiny", device=args.device)
    yield ddim(args, backbone)
    yield from null_text(args, backbone)


def ddim(args: argparse.Namespace, backbone: Backbone) -> Comparison:
    """Compare the inversion of a batch, and its reconstruction."""
    plain, steps = Plain(args.device), 2 if args.quick else 50
    images, prompts = embedded(2 if args.quick else 64)
    ours = Keep(partial(invert, backbone, images, prompts, "ddim", steps))
    theirs = Keep(partial(plain.invert, images, prompts, steps))

    def quality() -> str:
        back = (
            sample(backbone, ours.result, prompts, "ddim", steps),
            plain.sample(theirs.result, prompts, steps),
        )
        values = [reconstruction(images, one.cpu())["psnr"].mean().item() for one in back]
        return "images are reconstructed at {:.1f} dB, theirs {:.1f}".format(*values)

    who = "diffusers: UNet2DModel and DDIMInverseScheduler in a loop"
    name = f"invert, DDIM {steps}, batch {len(images)}"
    return Comparison(name, ours, theirs, who, quality, count=len(images))


def null_text(args: argparse.Namespace, backbone: Backbone) -> Iterator[Comparison]:
    """Compare a batch at once with ours one by one, and with the published loop."""
    steps, inner = (2, 1) if args.quick else (10, 10)
    images, prompts = embedded(2 if args.quick else 16, "top")
    run = inverter("null_text", steps=steps, inner=inner)
    batch = Keep(partial(inverted, run, backbone, images, prompts, GUIDANCE, len(images)))
    alone = Keep(partial(inverted, run, backbone, images, prompts, GUIDANCE, 1))
    loop = NullText(Plain(args.device), steps, inner, GUIDANCE)

    def one_by_one() -> list[tuple[Tensor, list[Tensor]]]:
        each = zip(images, prompts, strict=True)
        return [loop.invert(image[None], prompt) for image, prompt in each]

    published = Keep(one_by_one)

    def mse(others: Tensor) -> float:
        return (others.cpu() - images).square().mean().item()

    def back(found: dict[str, Tensor]) -> float:
        nulls = found["nulls"][found["null_rows"]]
        negative = Schedule.by_step(backbone.process.levels(steps), nulls)
        sampling = found["latents"], prompts, "ddim", steps, GUIDANCE
        return mse(sample(backbone, *sampling, negative=negative))

    def against_ours() -> str:
        one, other = batch.result, alone.result
        apart = (one["nulls"].float() - other["nulls"].float()).abs().max().item()
        errors = f"error² of the images {back(one):.2g} against {back(other):.2g}"
        return f"max difference of embeddings {apart:.1g}; {errors}"

    def against_theirs() -> str:
        each = zip(published.result, prompts, strict=True)
        theirs = torch.cat([loop.sample(latent, name, nulls) for (latent, nulls), name in each])
        return f"error² of the images {back(batch.result):.2g} against {mse(theirs):.2g}"

    name = f"null-text, {steps} steps of {inner}, batch {len(images)}"
    more = {"count": len(images), "bar": ("speed", 4.0)}
    yield Comparison(name, batch, alone, "ours, one image at a time", against_ours, **more)
    theirs = "the published loop over diffusers' UNet2DModel, one image at a time"
    yield Comparison(name, batch, published, theirs, against_theirs, **more)
