"""The class-conditional DiT of ImageNet through diffusers.

Peebles & Xie, *Scalable Diffusion Models with Transformers*, arXiv 2212.09748. Its process is
DDPM's linear one, as its scheduler file says, and its network also predicts a variance, which
deterministic solvers do not use.
"""

import torch
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion
from augment.diffusion.usage import Usage


class DiT(LatentDiffusion):
    """Prompts are class names or numbers; the empty prompt is the class of no class.

    The network looks its classes up by number, so the condition has ``labels`` and no ``text``:
    null-text inversion has nothing to optimise. It has one resolution.
    """

    name = "dit"
    part = "transformer"
    half = torch.bfloat16
    usage = Usage("", 4.0)  # no template: it has names for its own classes only
    blocks = ("BasicTransformerBlock",)
    fixed = ("resolution", "zero_terminal_snr", "lora", "lora_scale", "adapter")

    def embed(self, prompt: str) -> Condition:
        """Return ``labels`` (1,)."""
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
        """Return the transformer's ε, without the variance."""
        labels = condition["labels"]
        both = self.net(latent, timestep=times, class_labels=labels, return_dict=False)[0]
        return both[:, : latent.shape[1]]
