"""The class-conditional DiT of ImageNet through diffusers.

Peebles & Xie, *Scalable Diffusion Models with Transformers*, arXiv 2212.09748. Its process is
DDPM's linear one, as its scheduler file says, and its network also answers a variance, which
deterministic solvers have no use for.
"""

from pathlib import Path

import torch
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion
from augment.diffusion.checkpoints.checkpoint import Checkpoint


class DiT(LatentDiffusion):
    """Prompts are class names or numbers; the empty prompt is the class of no class.

    The network looks its classes up by number, so the condition has ``labels`` and no ``text``:
    null-text inversion has nothing to optimise.

    Args:
        checkpoint, device, dtype: see `LatentDiffusion`; it has one resolution.
        spacing, clean_end: see `read_process`.
        tiny_vae, compile: see `LatentDiffusion`.
    """

    name = "dit"
    part = "transformer"
    half = torch.bfloat16
    blocks = ("BasicTransformerBlock",)

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        spacing: str = "trailing",
        clean_end: bool = True,
        tiny_vae: str | Path | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            checkpoint,
            device,
            dtype,
            absent={},
            tiny_vae=tiny_vae,
            compile=compile,
            spacing=spacing,
            clean_end=clean_end,
        )

    def embed(self, prompt: str) -> Condition:
        """``labels`` (1,)."""
        classes: int = self.net.config.num_embeds_ada_norm
        labels: dict[str, int] = self.pipe.labels
        if not prompt:
            label = classes
        elif prompt in labels:
            label = labels[prompt]
        elif prompt.isdecimal() and int(prompt) < classes:
            label = int(prompt)
        else:
            raise UserError(
                f"expected a class of the checkpoint or a number below {classes} as prompt, got "
                f"{prompt!r}; names are such as {', '.join([*labels][:3])}"
            )
        return {"labels": torch.tensor([label], device=self.device)}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The transformer's ε, without the variance."""
        labels = condition["labels"]
        both = self.net(latent, timestep=times, class_labels=labels, return_dict=False)[0]
        return both[:, : latent.shape[1]]
