"""The UNet of `tiny`: that of diffusers' ``UNet2DModel``, to the bit, without importing diffusers.

That import takes longer than torch's own, and loads transformers, peft and scipy where these are
installed. Parameters have diffusers' names, order and beginnings, so that weights, low-rank weights
and seeds are good for both. What `tiny` does not use is left out.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPSILON = 1e-5
"""Of all group norms."""
UPSAMPLED = 64
"""Rows from which diffusers lays a batch out plainly before it is enlarged."""

Images = Float[Tensor, "n c h w"]
Others = Float[Tensor, "n C h w"]
Resized = Float[Tensor, "n c H W"]
Embedding = Float[Tensor, "n e"]


class Residual(nn.Module):
    """Two convolutions beside a shortcut, with the embedding between them.

    Args:
        narrow, wide: channels that come and go.
        embedding: width of the embedding.
        groups: of the norms.
        scaled: whether the embedding scales and shifts the channels, or is added to them.
    """

    def __init__(self, narrow: int, wide: int, embedding: int, groups: int, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled
        self.norm1 = nn.GroupNorm(groups, narrow, EPSILON)
        self.conv1 = nn.Conv2d(narrow, wide, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, 2 * wide if scaled else wide)
        self.norm2 = nn.GroupNorm(groups, wide, EPSILON)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(narrow, wide, 1) if narrow != wide else None
        self.checkpointing = False

    def forward(self, x: Images, embedding: Embedding) -> Others:
        """Return the sum of both."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, embedding, use_reentrant=False)
        return self._run(x, embedding)

    def _run(self, x: Images, embedding: Embedding) -> Others:
        hidden = self.conv1(F.silu(self.norm1(x)))
        change = self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        if self.scaled:
            scale, shift = change.chunk(2, 1)
            hidden = self.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm2(hidden + change)
        hidden = self.conv2(F.silu(hidden))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return x + hidden


class Attention(nn.Module):
    """Self-attention of the pixels beside a shortcut.

    Args:
        channels: of the images.
        head: width of a head.
        groups: of the norm; None is without one.
    """

    def __init__(self, channels: int, head: int, groups: int | None) -> None:
        super().__init__()
        self.heads = channels // head
        self.group_norm = nn.GroupNorm(groups, channels, EPSILON) if groups else None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Images) -> Images:
        """Return the sum of both."""
        rows = x.flatten(2)
        rows = (rows if self.group_norm is None else self.group_norm(rows)).transpose(1, 2)
        parts = (layer(rows) for layer in (self.to_q, self.to_k, self.to_v))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        rows = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.to_out[0](rows).transpose(1, 2).reshape(x.shape) + x


class Resampled(nn.Module):
    """A convolution that halves the side, or one after it was doubled."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, 1 if up else 2, padding=1)

    def forward(self, x: Images) -> Resized:
        """Return the images of another side."""
        if self.up:
            x = x.contiguous() if len(x) >= UPSAMPLED else x
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class Block(nn.Module):
    """Residuals, each with an attention after it if there are any, and a change of side.

    Args:
        widths: channels that come to each residual, and at last those that go.
        embedding, groups, scaled: see `Residual`.
        head: width of an attention's head; None is without attentions.
        sampler: ``downsamplers``, ``upsamplers``, or neither.
    """

    def __init__(
        self, widths: Sequence[int], embedding: int, groups: int, scaled: bool,
        head: int | None, sampler: str,
    ) -> None:  # fmt: skip
        super().__init__()
        attentions, resnets, wide = [], [], widths[-1]
        for narrow in widths[:-1]:
            resnets.append(Residual(narrow, wide, embedding, groups, scaled))
            if head is not None:
                attentions.append(Attention(wide, head, groups))
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if sampler:
            up = sampler == "upsamplers"
            self.add_module(sampler, nn.ModuleList([Resampled(wide, up)]))
        self.with_attention, self.sampler = bool(attentions), sampler

    def layer(self, number: int, x: Images, embedding: Embedding) -> Others:
        """Apply a residual, and the attention after it."""
        x = self.resnets[number](x, embedding)
        return self.attentions[number](x) if self.with_attention else x

    def resampled(self, x: Images) -> Resized:
        """Change the side."""
        return getattr(self, self.sampler)[0](x)


class Middle(nn.Module):
    """A residual, an attention, and a residual."""

    def __init__(self, width: int, embedding: int, groups: int, scaled: bool, head: int) -> None:
        super().__init__()
        first = Residual(width, width, embedding, groups, scaled)
        self.attentions = nn.ModuleList([Attention(width, head, None if scaled else groups)])
        self.resnets = nn.ModuleList([first, Residual(width, width, embedding, groups, scaled)])

    def forward(self, x: Images, embedding: Embedding) -> Images:
        """Return images of the same shape."""
        x = self.attentions[0](self.resnets[0](x, embedding))
        return self.resnets[1](x, embedding)


class Clock(nn.Module):
    """Sinusoids of a timestep, through two layers."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, timesteps: Real[Tensor, " n"]) -> Embedding:
        """Return the embedding of each timestep."""
        half = self.width // 2
        numbers = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        rates = torch.exp(-math.log(10000) * numbers / half)
        angles = timesteps[:, None].float() * rates
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], 1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class UNet(nn.Module):
    """The network; arguments are those of ``UNet2DModel``, which model cards hold.

    Args:
        sample_size: side of the latents, for information.
        in_channels, out_channels: of the latents.
        layers_per_block: residuals of a block on the way down; there is one more on the way up.
        block_out_channels: channels of each block.
        down_block_types, up_block_types: those that begin with ``Attn`` have attentions.
        norm_num_groups: groups of all norms.
        attention_head_dim: width of an attention's head.
        num_class_embeds: number of prompts.
        resnet_time_scale_shift: ``default`` or ``scale_shift``; see `Residual`.
    """

    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        layers_per_block: int,
        block_out_channels: Sequence[int],
        down_block_types: Sequence[str],
        up_block_types: Sequence[str],
        norm_num_groups: int,
        attention_head_dim: int,
        num_class_embeds: int,
        resnet_time_scale_shift: str = "default",
    ) -> None:
        super().__init__()
        widths, groups, head = list(block_out_channels), norm_num_groups, attention_head_dim
        embedding, last = 4 * widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = Clock(widths[0], embedding)
        self.class_embedding: nn.Module = nn.Embedding(num_class_embeds, embedding)
        common = embedding, groups, resnet_time_scale_shift == "scale_shift"

        def head_of(kind: str) -> int | None:
            return head if kind.startswith("Attn") else None

        down, up = [], []
        for number, kind in enumerate(down_block_types):
            wide, narrow = widths[number], widths[max(number - 1, 0)]
            sampler = "downsamplers" if number < last else ""
            own = [narrow, *[wide] * layers_per_block]
            down.append(Block(own, *common, head_of(kind), sampler))
        middle = Middle(widths[-1], *common, head)
        backwards = widths[::-1]
        for number, kind in enumerate(up_block_types):
            before, wide = backwards[max(number - 1, 0)], backwards[number]
            beside = [wide] * layers_per_block + [backwards[min(number + 1, last)]]
            own = [a + b for a, b in zip([before, *[wide] * layers_per_block], beside, strict=True)]
            sampler = "upsamplers" if number < last else ""
            up.append(Block([*own, wide], *common, head_of(kind), sampler))
        self.down_blocks, self.up_blocks = nn.ModuleList(down), nn.ModuleList(up)
        self.mid_block = middle
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], EPSILON)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, latents: Images, timesteps: Real[Tensor, " n"], prompts: Tensor) -> Others:
        """Return the prediction; prompts are what ``class_embedding`` takes."""
        embedding = self.time_embedding(timesteps)
        embedding = embedding + self.class_embedding(prompts).to(embedding.dtype)
        x = self.conv_in(latents)
        kept = [x]
        for block in self.down_blocks:
            assert isinstance(block, Block)
            for number in range(len(block.resnets)):
                x = block.layer(number, x, embedding)
                kept.append(x)
            if block.sampler:
                x = block.resampled(x)
                kept.append(x)
        x = self.mid_block(x, embedding)
        for block in self.up_blocks:
            assert isinstance(block, Block)
            for number in range(len(block.resnets)):
                x = block.layer(number, torch.cat([x, kept.pop()], 1), embedding)
            if block.sampler:
                x = block.resampled(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Compute residuals again on the way back, in place of keeping what is in them."""
        for part in self.modules():
            if isinstance(part, Residual):
                part.checkpointing = enabled

    def disable_gradient_checkpointing(self) -> None:
        """Keep what is in residuals."""
        self.enable_gradient_checkpointing(False)
