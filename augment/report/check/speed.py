"""How fast a model is here, beside the machine's matrix products and diffusers' own pipeline."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from augment.diffusion.backbones.latent_diffusion import LatentDiffusion
from augment.diffusion.solver import sample
from augment.inversion import invert, inverter
from augment.measure.reconstruction import psnr
from augment.report.check.subject import Line, Subject, short

T = TypeVar("T")
GIB = 2**30

PICTURES_AGREE = {torch.float32: 40.0, torch.float16: 20.0, torch.bfloat16: 15.0}
"""Lowest PSNR in dB of our pictures to those of diffusers, whose latents are of this precision."""


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has finished its queue."""
    if torch.device(device).type in ("cuda", "mps"):
        torch.accelerator.synchronize()


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds of a job, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure TFLOP/s of square matrix products of random numbers, the best of five runs."""
    size, count = (1024, 4) if device.type == "cpu" else (8192, 20)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run() -> None:
        for _ in range(count):
            torch.matmul(left, right)

    return 2 * size**3 * count / min(timed(run, device)[0] for _ in range(5)) / 1e12


def tflop_of(run: Callable[[], Any]) -> float:
    """Count the TFLOP of a job, of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


def sampled(subject: Subject, steps: int) -> Float[Tensor, "n c h w"]:
    """Sample by first order, with the guidance of the family."""
    backbone, guidance = subject.backbone, subject.backbone.usage.guidance
    return sample(backbone, subject.noise, subject.words, "ddim", steps, guidance, subject.batch)


def speed(subject: Subject) -> Iterator[Line]:
    """Time inversion and sampling, beside matrix products."""
    b, steps, batch = subject.backbone, subject.steps, subject.batch
    images = subject.pixels[torch.arange(batch) % len(subject.pixels)]
    condition = b.condition([subject.prompt])
    first, clean = subject.noise[:1].to(subject.device), subject.clean[:1]
    evaluation = tflop_of(lambda: b.network(first, b.process.timestep(0.5), condition))
    guided = b.usage.guidance != 1 and subject.prompt
    work = {
        "invert": evaluation * inverter("forward_start", steps=steps).evaluations
        + tflop_of(lambda: b.encode(images[:1].to(subject.device))),
        "sample": evaluation * steps * (2 if guided else 1) + tflop_of(lambda: b.decode(clean)),
    }
    rate = matmul_rate(subject.device, subject.dtype)
    runs: dict[str, Callable[[int], Tensor]] = {
        "invert": lambda n: invert(b, images, subject.words, steps=n, batch_size=batch),
        "sample": partial(sampled, subject),
    }
    for name, run in runs.items():
        run(2)  # warm-up
        seconds, _ = timed(partial(run, steps), subject.device)
        done = work[name] * batch / seconds
        text = (
            f"{batch / seconds:.3g} images/s, batch {batch}, {steps} steps; "
            f"{done:.3g} TFLOP/s, {done / rate:.0%} of matrix products' {rate:.3g}"
        )
        yield Line(name, text, values={"images_per_s": batch / seconds, "share": done / rate})


def beside_diffusers(subject: Subject) -> Iterator[Line]:
    """Compare our pictures, and their seconds, with those of diffusers' pipeline."""
    model, steps = subject.backbone, subject.steps
    if not isinstance(model, LatentDiffusion):
        return

    def run(count: int) -> Tensor | None:
        guidance = model.usage.guidance
        return model.sample_by_diffusers(subject.noise, subject.words, count, guidance)

    if run(steps) is None:  # warm-up
        return
    theirs_s, theirs = timed(partial(run, steps), subject.device)
    ours_s, ours = timed(partial(sampled, subject, steps), subject.device)
    assert theirs is not None
    db = psnr((theirs.cpu() - ours.cpu()).square().mean().item())
    least, ratio = PICTURES_AGREE[subject.dtype], theirs_s / ours_s
    good, reason = db >= least and ratio > 0.8, ""
    text = (
        f"its pipeline takes {ratio:.2f} × our time; its pictures equal ours to {db:.1f} dB, "
        "by the same noise, steps and guidance"
    )
    if not db >= least:
        reason = f"expected at least {least:g} dB in {short(subject.dtype)}; compare in float32"
    elif not good:
        reason = "expected at least 0.8 × our time"
    yield Line("diffusers", text, good, reason, {"times": ratio, "psnr": db})


def memory(subject: Subject) -> Iterator[Line]:
    """Say how much memory was used at most."""
    if subject.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(subject.device) / GIB
        total = torch.cuda.get_device_properties(subject.device).total_memory / GIB
        text = f"{peak:.1f} GiB of tensors at most, of {total:.0f} GiB"
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
        text = f"{peak:.1f} GiB of the process at most"
    yield Line("memory", text, values={"peak_gib": peak})
