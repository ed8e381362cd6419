"""The sampler on the embedded backbone against the loop of diffusers' ``DDIMPipeline``.

Both follow the same levels with the same weights from the same latents, so the images are equal but
for the last bits.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from augment import load_backbone, sample
from augment.diffusion import Backbone
from benchmarks.paired import Comparison, Keep
from benchmarks.plain import Plain

BASELINE = "diffusers: UNet2DModel and DDIMScheduler, as DDIMPipeline loops"


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare single images, a few, and a batch; then the batch compiled."""
    plain = Plain(args.device)
    backbone = load_backbone("tiny", device=args.device)
    for batch in (1, 4) if args.quick else (1, 8, 64):
        yield against_diffusers(args, backbone, plain, batch, "")
    if not args.quick:
        compiled = load_backbone("tiny", device=args.device, compile=True)
        yield against_diffusers(args, compiled, plain, 64, ", compiled")


def against_diffusers(
    args: argparse.Namespace, backbone: Backbone, plain: Plain, batch: int, how: str
) -> Comparison:
    """Compare a batch of ours with one of diffusers'."""
    steps = 4 if args.quick else 20
    latents = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(batch))
    latents = latents.to(args.device)
    ours = Keep(partial(sample, backbone, latents, solver="ddim", steps=steps))
    theirs = Keep(partial(plain.sample, latents, [""] * batch, steps))

    def difference() -> str:
        apart = (ours.result.cpu() - theirs.result.cpu()).abs().max().item()
        return f"max difference {apart:.1g}"

    return Comparison(
        f"sample, DDIM {steps}, batch {batch}{how}", ours, theirs, BASELINE, difference,
        count=batch, bar=("speed", 1.3) if batch == 64 else None,
    )  # fmt: skip
