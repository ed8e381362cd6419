r"""Low-rank weights with a head an image: one A for all images, and a B for each of them.

A layer gives :math:`Wx + \sum_i w_i B_i A x`, with weights w of the heads that sum to 1 and may
differ by row of a batch. Kim et al., *ChimeraLoRA: Multi-Head LoRA-Guided Synthetic Datasets*,
arXiv 2602.19708, draw them from a Dirichlet distribution; here a plan has drawn them already, for
the latents of the same images.

Heads are references (`augment.diffusion.conditions.Referred`): the reference of an image has a 1 in
the column of its head, so that the mixture of references by a plan's weights is w. What the weights
of a row lack to 1 goes to the mean head of its prompt: an image without a head has zeros.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.core.rng import normal, rng
from augment.diffusion.checkpoints.hub import damaged

HEADS_FILE = "image_heads.safetensors"
IMAGE_HEADS = "image heads"
"""Begins what a backbone's fingerprint says of its references, if these are heads."""

_SIDE, _TOLERANCE = 16, 2 / 255  # an image is known by these averages of its pixels
_THUMBNAILS, _DOWN, _UP = "thumbnails", ".lora_A.weight", ".lora_B.weight"


def thumbnails(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Return what images are known by: the averages of 16 × 16 blocks."""
    return F.adaptive_avg_pool2d(images.float(), _SIDE).flatten(1)


def refuse_beside_heads(**options: object) -> None:
    """Refuse options of a backbone that do not go with image heads."""
    if given := [name for name, value in options.items() if value]:
        raise UserError(f"expected image heads without {given[0]}, got both; leave {given[0]} out")


class ImageHeads(nn.Module):
    """Low-rank weights of a network's linear layers, with a head an image.

    The layers stay as they are; hooks add to what they give.

    Args:
        network: whose layers they are of.
        downs: A of each layer, by its name.
        ups: B of each image and layer.
        known: thumbnails of the images.
        prompts: of each image's class.

    Raises:
        UserError: a layer that is not there, or of another size.

    Attributes:
        weights: (b, n) of the heads in the rows of the call of the network to come.
    """

    known: Tensor

    def __init__(
        self,
        network: nn.Module,
        downs: Mapping[str, Float[Tensor, "rank width"]],
        ups: Mapping[str, Float[Tensor, "n height rank"]],
        known: Float[Tensor, "n d"],
        prompts: Sequence[str],
    ) -> None:
        super().__init__()
        self.names, self.prompts, self.weights = [*downs], [*prompts], known.new_zeros(0)
        self.down = nn.ParameterList(downs.values())
        self.up = nn.ParameterList(ups[name] for name in downs)
        self.register_buffer("known", known, persistent=False)
        layers = dict(network.named_modules())
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            layer, count = layers.get(name), len(known)
            sizes = (down.shape[1], *up.shape) if down.ndim == 2 and up.ndim == 3 else ()
            if not isinstance(layer, nn.Linear) or sizes != (
                layer.in_features, count, layer.out_features, len(down),
            ):  # fmt: skip
                raise UserError(
                    f"expected image heads for this model, got some of other layers ({name}); take "
                    "the model that they were trained on"
                )
            layer.register_forward_hook(partial(self._add, down, up))

    @classmethod
    def begin(
        cls,
        network: nn.Module,
        layers: Sequence[str],
        rank: int,
        known: Float[Tensor, "n d"],
        prompts: Sequence[str],
        seed: int = 0,
    ) -> "ImageHeads":
        """Return heads that change nothing yet: A is drawn, and each B is 0."""
        downs, ups = {}, {}
        for number, name in enumerate(layers):
            height, width = network.get_parameter(f"{name}.weight").shape
            downs[name] = normal(rng(seed, "heads", number), rank, width) / (3 * width) ** 0.5
            ups[name] = torch.zeros(len(known), height, rank)
        return cls(network, downs, ups, known, prompts)

    @classmethod
    def load(cls, network: nn.Module, path: Path) -> "ImageHeads":
        """Read heads of a file.

        Raises:
            UserError: they are damaged, or of another model.
        """
        with damaged(path), safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            prompts = json.loads((file.metadata() or {}).get("prompts", "null"))
        known = state.pop(_THUMBNAILS, torch.zeros(0))
        names = [key.removesuffix(_DOWN) for key in state if key.endswith(_DOWN)]
        keys = {name + end for name in names for end in (_DOWN, _UP)}
        whole = isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)
        finite = all(value.isfinite().all() for value in (known, *state.values()))
        if not whole or known.ndim != 2 or len(prompts) != len(known) or not finite or (
            not names or keys != state.keys()
        ):  # fmt: skip
            raise UserError(f"expected image heads in {path}, got another file; adapt again")
        downs, ups = ({n: state[n + end].float() for n in names} for end in (_DOWN, _UP))
        heads = cls(network, downs, ups, known, prompts)
        heads.requires_grad_(False)
        return heads

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a file."""
        state = {_THUMBNAILS: self.known}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            state |= {name + _DOWN: down, name + _UP: up}
        return {key: value.detach().cpu().contiguous() for key, value in state.items()}

    def metadata(self) -> dict[str, str]:
        """Return the header of a file."""
        return {"format": "pt", "prompts": json.dumps(self.prompts)}

    def refer(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m"]:
        """Return the weights of each image's own head, or zeros if it has none."""
        found, known = thumbnails(images.to(self.known.device)), self.known.float()
        distance = torch.cdist(found, known, p=float("inf"))
        own = F.one_hot(distance.argmin(1), len(known)).float()
        return own * (distance.amin(1, keepdim=True) <= _TOLERANCE)

    def of(self, prompts: Sequence[str]) -> Float[Tensor, "n m"]:
        """Return equal weights of the heads of each prompt, or of all for another prompt."""
        same = [[prompt == text for text in self.prompts] for prompt in prompts]
        rows = torch.tensor(same, dtype=torch.float32, device=self.known.device)
        rows = rows.view(-1, len(self.prompts))
        rows[~rows.any(1)] = 1
        return rows / rows.sum(1, keepdim=True)

    def _add(
        self, down: Tensor, up: Tensor, layer: nn.Module, given: tuple[Tensor], output: Tensor
    ) -> Tensor:
        """Add the mixture of heads of each row to a layer's output."""
        low = F.linear(given[0].to(down), down)
        mixed = torch.einsum("bm,mor->bor", self.weights.to(up), up)
        return output + torch.einsum("b...r,bor->b...o", low, mixed).to(output)
