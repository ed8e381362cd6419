"""The sampler on the embedded backbone against the loop of diffusers' ``DDIMPipeline``.

Both walk the same levels with the same weights from the same latents, so the images are to be
equal but for the last bits. The last row is what another program on the same cores does to us,
with threads that sleep or spin while they wait (docs/jobs.md).
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from augment import load_backbone, sample
from augment.diffusion import Backbone
from benchmarks.duel import Duel, Kept
from benchmarks.plain import Plain, difference

OPPONENT = "diffusers: UNet2DModel and DDIMScheduler, as DDIMPipeline loops"


BUSY = """
import sys, time, torch
from augment import load_backbone, sample
backbone, latents = load_backbone("tiny", device="cpu"), torch.randn(64, 4, 16, 16)
times = []
for _ in range(3):
    start = time.perf_counter()
    sample(backbone, latents, solver="ddim", steps=int(sys.argv[1]))
    times.append(time.perf_counter() - start)
print(sorted(times)[1])
"""
"""Samples a batch three times, and says what the middle one took."""


def suite(args: argparse.Namespace) -> Iterator[Duel]:
    """Single images, a few, and a batch; the batch compiled; a machine that is busy."""
    plain = Plain(args.device)
    backbone = load_backbone("tiny", device=args.device)
    for batch in (1, 4) if args.quick else (1, 8, 64):
        yield against(args, backbone, plain, batch, "")
    if not args.quick:
        compiled = load_backbone("tiny", device=args.device, compile=True)
        yield against(args, compiled, plain, 64, ", compiled")
        yield busy()


def against(
    args: argparse.Namespace, backbone: Backbone, plain: Plain, batch: int, how: str
) -> Duel:
    """A batch of ours and of diffusers'."""
    steps = 4 if args.quick else 20
    latents = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(batch))
    latents = latents.to(args.device)
    ours = Kept(partial(sample, backbone, latents, solver="ddim", steps=steps))
    theirs = Kept(partial(plain.sample, latents, [""] * batch, steps))
    return Duel(
        name=f"sample, DDIM {steps}, batch {batch}{how}",
        ours=ours,
        theirs=theirs,
        opponent=OPPONENT,
        quality=partial(difference, ours, theirs),
        count=batch,
        bar=("speed", 1.3) if batch == 64 else None,
    )


@contextmanager
def burner() -> Iterator[None]:
    """Another program that wants a core."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def busy() -> Duel:
    """Processes that sample with threads for all cores while another program wants one."""

    def run(policy: str) -> float:
        env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        command = [sys.executable, "-c", BUSY, "5"]
        with burner():
            told = subprocess.run(
                command, env=env | ({"OMP_WAIT_POLICY": policy} if policy else {}),
                check=True, capture_output=True, text=True,
            )  # fmt: skip
        return float(told.stdout)

    ours, theirs = Kept(partial(run, "PASSIVE")), Kept(partial(run, ""))
    return Duel(
        name="a process that samples, DDIM 5, batch 64, thrice, beside a busy program",
        ours=ours,
        theirs=theirs,
        opponent="threads that spin while they wait, libgomp's default",
        quality=lambda: f"a batch in {ours.found:.2f} s against {theirs.found:.2f} s",
        unit="process",
    )
