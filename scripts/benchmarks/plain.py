"""The embedded backbone as a user of diffusers would run it, made of diffusers' classes alone.

Only the file of weights is shared with `augment.diffusion.backbones.tiny`. Network, schedulers and
loops are those of diffusers' documentation, with its defaults; the codec is written out again.
"""

import json
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, UNet2DModel
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import mse_loss, pixel_shuffle, pixel_unshuffle

from augment.diffusion.backbones.tiny import WEIGHTS

PROMPTS = ("", "top", "trousers", "footwear", "bag")
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
"""Values of the model card; the others are diffusers' defaults."""
HAAR = 0.5 * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


class Plain:
    """Network and codec on a device."""

    def __init__(self, device: str) -> None:
        with safe_open(WEIGHTS, framework="pt") as file:
            self.config = json.loads(file.metadata()["config"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.unet: Any = UNet2DModel(**self.config["unet"])
        self.unet.load_state_dict(state)
        self.unet.eval().requires_grad_(False).to(device)
        self.device, self.haar = device, HAAR.to(device)

    def labels(self, prompts: list[str]) -> Tensor:
        """Return the class labels of prompts."""
        return torch.tensor([PROMPTS.index(prompt) for prompt in prompts], device=self.device)

    def encode(self, images: Tensor) -> Tensor:
        """Turn images (n, 1, 32, 32) in [0, 1] into clean latents by a Haar transform."""
        blocks = pixel_unshuffle(images.to(self.device) - self.config["white"], 2)
        return torch.einsum("ij,njhw->nihw", self.haar, blocks) * self.config["scale"]

    def decode(self, clean: Tensor) -> Tensor:
        """Turn clean latents into images."""
        blocks = torch.einsum("ij,njhw->nihw", self.haar, clean / self.config["scale"])
        return (pixel_shuffle(blocks, 2) + self.config["white"]).clamp(0, 1)

    @torch.no_grad()
    def sample(self, latents: Tensor, prompts: list[str], steps: int) -> Tensor:
        """Sample images by the loop of diffusers' ``DDIMPipeline``, with classes."""
        scheduler = DDIMScheduler(**SCHEDULE)
        return self.decode(self._walk(scheduler, latents, self.labels(prompts), steps))

    @torch.no_grad()
    def invert(self, images: Tensor, prompts: list[str], steps: int) -> Tensor:
        """Invert images by the same loop with the inverse scheduler."""
        scheduler = DDIMInverseScheduler(**SCHEDULE)
        return self._walk(scheduler, self.encode(images), self.labels(prompts), steps)

    def _walk(self, scheduler: Any, latents: Tensor, labels: Tensor, steps: int) -> Tensor:
        scheduler.set_timesteps(steps, device=self.device)
        for t in scheduler.timesteps:
            output = self.unet(latents, t, class_labels=labels).sample
            latents = scheduler.step(output, t, latents).prev_sample
        return latents


class NullText:
    """The published loop of null-text inversion, one image at a time.

    Mokady et al., *Null-text Inversion*, arXiv 2211.09794, alg. 1, with the learning rate and the
    early stop of its code: torch's Adam on the unconditional embedding of each step.

    Args:
        plain: the network; its table of prompts moves here, so that it can be optimised.
        steps: solver steps.
        inner: maximum number of Adam steps for each of them.
        guidance: scale.
    """

    def __init__(self, plain: Plain, steps: int, inner: int, guidance: float) -> None:
        self.plain, self.inner, self.guidance = plain, inner, guidance
        self.texts = plain.unet.class_embedding.weight.detach().clone()
        plain.unet.class_embedding = torch.nn.Identity()
        self.forward = DDIMScheduler(**SCHEDULE)
        self.forward.set_timesteps(steps, device=plain.device)

    def answer(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Ask the network."""
        return self.plain.unet(latent, t, class_labels=text).sample

    def guided(self, latent: Tensor, t: Tensor, free: Tensor, bound: Tensor) -> Tensor:
        """Take a guided step down."""
        output = free + self.guidance * (bound - free)
        return self.forward.step(output, t, latent).prev_sample

    def pivots(self, image: Tensor, text: Tensor) -> list[Tensor]:
        """Return the latents of all levels, from the clean one up; the paper's eq. 3.

        The network is asked at the level that the step goes to, and its v becomes ε there.
        diffusers' inverse scheduler converts at the level that the step leaves, which costs much
        in few steps.
        """
        found, here = [self.plain.encode(image)], torch.tensor(1.0, device=self.plain.device)
        for t in self.forward.timesteps.flip(0):
            latent, there = found[-1], self.forward.alphas_cumprod[t].to(here)
            noise = there.sqrt() * self.answer(latent, t, text) + (1 - there).sqrt() * latent
            clean = (latent - (1 - here).sqrt() * noise) / here.sqrt()
            found.append(there.sqrt() * clean + (1 - there).sqrt() * noise)
            here = there
        return found

    @torch.no_grad()
    def invert(self, image: Tensor, prompt: str) -> tuple[Tensor, list[Tensor]]:
        """Return the latent (1, …) of an image and its embeddings, from the noisiest level down."""
        text, null = (self.texts[self.plain.labels([name])] for name in (prompt, ""))
        pivots, nulls = self.pivots(image, text), []
        latent = pivots[-1]
        for number, t in enumerate(self.forward.timesteps):
            done = 50 * number / len(self.forward.timesteps)  # the code counts its 50 steps
            bound = self.answer(latent, t, text)
            null = self.fit(latent, t, bound, null, pivots[-2 - number], done)
            latent = self.guided(latent, t, self.answer(latent, t, null), bound)
            nulls.append(null)
        return pivots[-1], nulls

    @torch.enable_grad()
    def fit(
        self, latent: Tensor, t: Tensor, bound: Tensor, null: Tensor, goal: Tensor, done: float
    ) -> Tensor:
        """Optimise the embedding until a step reaches its goal."""
        null = null.detach().clone().requires_grad_()
        adam = torch.optim.Adam([null], lr=1e-2 * (1 - done / 100))
        for _ in range(self.inner):
            loss = mse_loss(self.guided(latent, t, self.answer(latent, t, null), bound), goal)
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < 1e-5 + 2e-5 * done:
                break
        return null.detach()

    @torch.no_grad()
    def sample(self, latent: Tensor, prompt: str, nulls: list[Tensor]) -> Tensor:
        """Sample the image again."""
        text = self.texts[self.plain.labels([prompt])]
        for t, null in zip(self.forward.timesteps, nulls, strict=True):
            free, bound = self.answer(latent, t, null), self.answer(latent, t, text)
            latent = self.guided(latent, t, free, bound)
        return self.plain.decode(latent)
