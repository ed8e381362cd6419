"""The two sides of `benchmarks.backbones`: a model run by this package and by diffusers."""

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from augment import invert, load_backbone, sample
from augment.diffusion.checkpoints.hub import quiet
from benchmarks.backbone_configs import PIPELINES, VP, Model

Run = Callable[[int], Tensor]
"""Does a job for a number of images."""

GUIDANCE = 7.5


@dataclass
class Bench:
    """A model on a device, with the inputs that both sides get."""

    model: Model
    folder: Path
    args: argparse.Namespace

    def __post_init__(self) -> None:
        args, model = self.args, self.model
        self.device, cuda = args.device, args.device.startswith("cuda")
        self.resolution = args.resolution or model.resolution
        self.batch = args.batch or (16 if cuda else 2)
        self.dtype = getattr(torch, args.dtype or (model.half if cuda else "float32"))
        generator = torch.Generator().manual_seed(1)
        side = self.resolution // 2 ** (len(model.vae["block_out_channels"]) - 1)
        shape = (self.batch, model.vae["latent_channels"], side, side)
        self.latents = torch.randn(shape, generator=generator).to(self.device)
        pixels = torch.rand(self.batch, 3, 8, 8, generator=generator).to(self.device)
        self.images = torch.nn.functional.interpolate(pixels, self.resolution, mode="bilinear")
        self.prompts = [f"a photo of a {'cat' if n % 2 else 'tench'}" for n in range(self.batch)]

    def jobs(self, tflop: dict[str, float]) -> dict[str, float]:
        """Map what is timed to TFLOP an image."""
        (many, few), net = self.model.steps, tflop["network"]
        first = "Euler" if self.model.kind == "sd3" else "DDIM"
        guided = f"guidance {GUIDANCE}"
        return {
            f"invert, {first} {many}": many * net + tflop["encoder"],
            f"sample, {first} {many}, {guided}": 2 * many * net + tflop["decoder"],
            f"sample, DPM++ {few}, {guided}": 2 * few * net + tflop["decoder"],
        }

    def ours(self, dtype: torch.dtype, compiled: bool = False) -> list[Run]:
        """Return our side of the jobs, each a function of the number of images."""
        many, few = self.model.steps
        backbone = load_backbone(
            self.folder, device=self.device, dtype=dtype, resolution=self.resolution,
            compile=compiled, **self.model.options,
        )  # fmt: skip
        batch = {"batch_size": self.batch}

        def sampled(count: int, solver: str, steps: int) -> Tensor:
            latents, prompts = self.latents[:count], self.prompts[:count]
            return sample(backbone, latents, prompts, solver, steps, GUIDANCE, **batch)

        return [
            lambda n: invert(backbone, self.images[:n], self.prompts[:n], "ddim", many, **batch),
            lambda n: sampled(n, "ddim", many),
            lambda n: sampled(n, "dpm++", few),
        ]

    def theirs(self, compiled: bool = False) -> list[Run]:
        """Return diffusers' side, as its documentation runs it; images stay tensors."""
        with quiet():
            pipe = PIPELINES[self.model.kind].from_pretrained(self.folder, dtype=self.dtype)
            pipe = pipe.to(self.device)
        pipe.set_progress_bar_config(disable=True)
        if compiled:  # its tutorial "Accelerate inference"
            part = "transformer" if self.model.kind == "sd3" else "unet"
            net = getattr(pipe, part).to(memory_format=torch.channels_last)
            setattr(pipe, part, torch.compile(net, mode="max-autotune", fullgraph=True))
        many, few = self.model.steps
        euler, dpm, inverse = schedulers(self.model.kind, pipe.scheduler)
        flow = self.model.kind == "sd3"
        sigmas = {"sigmas": [1 - k / many for k in range(many)]} if flow else {}

        def run(count: int, scheduler: Any, steps: int, **more: Any) -> Tensor:
            pipe.scheduler = copy.deepcopy(scheduler)
            options = {"latents": self.latents[:count].to(self.dtype), "guidance_scale": GUIDANCE}
            options |= {"height": self.resolution, "width": self.resolution, "output_type": "pt"}
            options |= {"num_inference_steps": steps, **more}
            return pipe(self.prompts[:count], **options).images

        def inverted(count: int) -> Tensor:
            clean = encoded(pipe.vae, self.images[:count], self.dtype)
            if flow:
                return euler_inverted(pipe, euler, clean, self.prompts[:count], sigmas["sigmas"])
            options = {"latents": clean, "guidance_scale": 1.0, "output_type": "latent"}
            return run(count, inverse, many, **options)

        return [inverted, lambda n: run(n, euler, many, **sigmas), lambda n: run(n, dpm, few)]


def schedulers(kind: str, scheduler: Any) -> tuple[Any, Any, Any]:
    """Return diffusers' first order, DPM++ and DDIM inversion, on our levels if it has them."""
    if kind == "sd3":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return scheduler, diffusers.DPMSolverMultistepScheduler(**flow), None
    return (
        scheduler,
        diffusers.DPMSolverMultistepScheduler(**VP),
        diffusers.DDIMInverseScheduler(**VP, clip_sample=False),
    )


@torch.no_grad()
def euler_inverted(
    pipe: Any, scheduler: Any, clean: Tensor, prompts: list[str], sigmas: list[float]
) -> Tensor:
    """Take Euler steps up a scheduler's levels; level 0 is untrained, so ask at the next."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(sigmas=sigmas)
    text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    latent = clean.float()
    for low, high in itertools.pairwise(scheduler.sigmas.flip(0).tolist()):
        times = torch.full((len(latent),), 1000 * (low or high), device=latent.device)
        speed = pipe.transformer(latent.to(clean), text, pooled, times).sample
        latent = latent + (high - low) * speed.float()
    return latent


def encoded(vae: Any, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Encode by diffusers' VAE, in float32 where its configuration asks for that."""
    precision = torch.float32 if vae.config.force_upcast else dtype
    torch.nn.Module.to(vae, precision)
    with torch.no_grad():
        clean = vae.encode((2 * images - 1).to(precision)).latent_dist.mode()
    torch.nn.Module.to(vae, dtype)
    clean = (clean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return clean.to(dtype)
