"""The class-conditional LightningDiT of ImageNet, in the latents of VA-VAE.

Yao et al., *Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models*,
arXiv 2501.01423. It is a SiT with rotary positions (RoPE; Su et al., arXiv 2104.09864), gated units
(SwiGLU; Shazeer, arXiv 2002.05202) and norms without a mean (RMSNorm; Zhang & Sennrich, arXiv
1910.07467). VA-VAE has 32 channels and is 16 times smaller than the image; each channel is
normalised by its mean and deviation. The names of the layers are those of
``models/lightningdit.py`` in github.com/hustvl/LightningDiT, but that an attention's ``qkv`` and
``proj`` have diffusers' names, ``to_q``, ``to_k``, ``to_v`` and ``to_out.0``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.backbones.sit import SiT
from augment.diffusion.checkpoints.checkpoint import Checkpoint
from augment.diffusion.usage import Usage

_USED = {"use_rope": True, "use_swiglu": True, "use_rmsnorm": True, "wo_shift": False}
"""Settings of the published models; others are ablations of the paper."""

_QKV, _OUT = ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0"
_FREQUENCIES = 128
"""Number of frequencies of the timestep's embedding."""


class LightningDiT(SiT):
    """Prompts are class names or numbers; the empty prompt is the class of no class.

    Guidance changes the first three of its 32 channels alone, as in the published sampler.
    """

    name = "lightningdit"
    kind = "LightningDiT"
    usage = Usage("", 6.7)
    blocks = ("Block",)

    def load(self, checkpoint: Checkpoint, parts: Sequence[str]) -> Any:
        """Build diffusers' pipeline of DiT around the network.

        Raises:
            UserError: the latents have no statistics.
        """
        pipe = super().load(checkpoint, parts)
        config = pipe.vae.config
        if not (config.latents_mean and config.latents_std):
            raise UserError(
                "expected latents_mean and latents_std in the vae/config.json of "
                f"{checkpoint.source}, got none; write there what latents_stats.pt says"
            )
        pipe.vae.register_to_config(scaling_factor=1.0)  # which files leave at diffusers' default
        return pipe

    def build(self, config: Mapping[str, Any], state: dict[str, Tensor]) -> Any:
        """Build the network from its config and its weights by their published names."""
        for key, value in _USED.items():
            if config.get(key, False) is not value:
                raise UserError(
                    f"expected a LightningDiT with {key} {value}, got {config.get(key)}; take one "
                    "of the published kind"
                )
        with torch.device("meta"):
            net = Transformer(config)
        net.load_state_dict(_split(state), assign=True)
        return net

    def shift(self, written: float | None) -> float:
        """Return the shift of the noise levels from ``timestep_shift``, and back.

        The published one, 0.3, is of the share of the image, 1 − σ, so that σ has its inverse. The
        scheduler files of checkpoints for diffusers have the published number; 0 is none.
        """
        return float(f"{1 / (0.3 if written is None else written or 1.0):.6g}")

    def settings(self) -> dict[str, Any]:
        """Return the network's config as published."""
        return {**self.net.settings, **_USED}

    def published(self) -> dict[str, Tensor]:
        """Return the network's weights by their published names."""
        return _joined(self.net.state_dict())

    def _embedders(self) -> list[Any]:
        """Return what looks classes up."""
        return [self.net.y_embedder]


class Transformer(nn.Module):
    """The network: latents, the share of the image in them, and classes, to velocities.

    Args:
        config: by the names of the published code.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        keys = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        size, patch, channels, width, depth, heads = (config[key] for key in keys)
        self.settings = {key: config[key] for key in (*keys, "num_classes")} | {
            "mlp_ratio": config.get("mlp_ratio", 4.0),
            "learn_sigma": config.get("learn_sigma", False),
            "use_qknorm": config.get("use_qknorm", config.get("qk_norm", False)),
        }
        names = {"sample_size": size, "num_embeds_ada_norm": config["num_classes"]}
        self.config = FrozenDict(self.settings | names)
        self.side, self.patch = size // patch, patch
        time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        classes = nn.Embedding(config["num_classes"] + 1, width)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.t_embedder = nn.ModuleDict({"mlp": time})
        self.y_embedder = nn.ModuleDict({"embedding_table": classes})
        self.pos_embed = nn.Parameter(torch.empty(1, self.side**2, width))
        inner = int(2 / 3 * int(width * self.settings["mlp_ratio"]))
        normed = self.settings["use_qknorm"]
        self.blocks = nn.ModuleList(Block(width, heads, inner, normed) for _ in range(depth))
        outputs = patch**2 * channels * (2 if self.settings["learn_sigma"] else 1)
        self.final_layer = nn.ModuleDict(
            {
                "norm_final": nn.RMSNorm(width, 1e-6),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
                "linear": nn.Linear(width, outputs),
            }
        )

    def forward(
        self,
        latent: Float[Tensor, "n c h w"],
        timestep: Float[Tensor, " n"],
        class_labels: Int[Tensor, " n"],
        return_dict: bool = False,
    ) -> tuple[Float[Tensor, "n d h w"]]:
        """Return the velocity from the noise to the image, alone in a tuple, as diffusers does."""
        frequencies = 10000 ** (-torch.arange(_FREQUENCIES, device=latent.device) / _FREQUENCIES)
        angles = timestep[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], 1).to(latent.dtype)
        embedding = self.t_embedder["mlp"](sinusoids)
        embedding = embedding + self.y_embedder["embedding_table"](class_labels)
        x = self.x_embedder["proj"](latent).flatten(2).mT + self.pos_embed
        rotary = self._rotary(latent.device)
        for block in self.blocks:
            x = block(x, embedding, rotary)
        last = self.final_layer
        shift, scale = last["adaLN_modulation"](embedding)[:, None].chunk(2, -1)
        x = last["linear"](last["norm_final"](x) * (1 + scale) + shift)
        cells = x.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.side, self.side))
        return (cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3),)

    def _rotary(self, device: torch.device) -> Float[Tensor, "2 n d"]:
        """Compute cosine and sine of the angle of each place for each pair of a head's numbers.

        The first half of the pairs rotates with the row, the second with the column.
        """
        half = self.settings["hidden_size"] // self.settings["num_heads"] // 2
        frequencies = 10000 ** (-torch.arange(0, half, 2, device=device) / half)
        angles = torch.arange(self.side, device=device)[:, None] * frequencies
        angles = angles.repeat_interleave(2, 1)
        rows = angles[:, None].expand(-1, self.side, -1)
        both = torch.cat([rows, rows.transpose(0, 1)], 2).flatten(0, 1)
        return torch.stack([both.cos(), both.sin()])


class Block(nn.Module):
    """A block: attention and a gated unit, each with a shift, a scale and a gate."""

    def __init__(self, width: int, heads: int, inner: int, normed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.attn = Attention(width, heads, normed)
        unit = {"w12": nn.Linear(width, 2 * inner), "w3": nn.Linear(inner, width)}
        self.mlp = nn.ModuleDict(unit)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        embedding: Float[Tensor, "b d"],
        rotary: Float[Tensor, "2 n h"],
    ) -> Float[Tensor, "b n d"]:
        """Return the next tokens."""
        parts = self.adaLN_modulation(embedding)[:, None].chunk(6, -1)
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0], rotary)
        gate, values = self.mlp["w12"](self.norm2(x) * (1 + parts[4]) + parts[3]).chunk(2, -1)
        return x + parts[5] * self.mlp["w3"](F.silu(gate) * values)


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, width: int, heads: int, normed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        kinds = (nn.RMSNorm(width // heads, 1e-6) if normed else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = kinds

    def forward(
        self, x: Float[Tensor, "b n d"], rotary: Float[Tensor, "2 n h"]
    ) -> Float[Tensor, "b n d"]:
        """Return what each token takes from all."""
        parts = (layer(x) for layer in (self.to_q, self.to_k, self.to_v))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


def rotate(x: Float[Tensor, "... n h"], rotary: Float[Tensor, "2 n h"]) -> Float[Tensor, "... n h"]:
    """Rotate pairs of neighbouring numbers by the angles of their places."""
    pairs = x.unflatten(-1, (-1, 2))
    across = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    return (x * rotary[0] + across * rotary[1]).to(x.dtype)


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of attention to diffusers' names; leave out the angles, which are known."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for name, rows in zip(_QKV, value.chunk(3), strict=True):
                named[key.replace("attn.qkv", name)] = rows
        elif not key.startswith("feat_rope."):
            named[key.replace("attn.proj", _OUT)] = value
    return named


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of attention to their published names."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if f".{_QKV[0]}." in key:
            rows = [state[key.replace(_QKV[0], name)] for name in _QKV]
            named[key.replace(_QKV[0], "attn.qkv")] = torch.cat(rows)
        elif not any(f".{name}." in key for name in _QKV):
            named[key.replace(_OUT, "attn.proj")] = value.contiguous()
    return named
