"""SiT and LightningDiT as their papers and makers have them, over weights by published names."""

import itertools

import torch
import torch.nn.functional as F
from checkpoints import LIGHTNINGDIT, SIT


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(state, name, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def begun(state, latent, share, labels, stride):
    """Return the patches of latents, and what the share of the image in [0, 1] and classes say."""
    frequencies = 10000 ** (-torch.arange(128) / 128)
    angles = share * frequencies.expand(len(latent), -1)
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    embedding = linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", waves)))
    embedding = F.silu(embedding + state["y_embedder.embedding_table.weight"][labels])
    weight, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    x = F.conv2d(latent, weight, bias, stride=stride).flatten(2).mT + state["pos_embed"]
    return x, embedding


def sit_velocity(state, latent, share, labels, heads=SIT["num_heads"]):
    """The network of arXiv 2401.08740: DiT's blocks."""
    x, embedding = begun(state, latent, share, labels, 2)
    for number in range(SIT["depth"]):
        block = f"blocks.{number}"
        parts = linear(state, f"{block}.adaLN_modulation.1", embedding)[:, None].chunk(6, 2)
        rows = linear(state, f"{block}.attn.qkv", modulated(x, *parts[:2]))
        q, k, v = rows.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        mixed = linear(state, f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + parts[2] * mixed
        inner = linear(state, f"{block}.mlp.fc1", modulated(x, *parts[3:5]))
        inner = linear(state, f"{block}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        x = x + parts[5] * inner
    parts = linear(state, "final_layer.adaLN_modulation.1", embedding)[:, None].chunk(2, 2)
    pixels = linear(state, "final_layer.linear", modulated(x, *parts)).unflatten(2, (2, 2, -1))
    side = latent.shape[-1] // 2
    grid = pixels.unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
    return grid.flatten(4).flatten(2, 3)[:, :4]


HEADS, WIDTH, SIDE = (LIGHTNINGDIT[key] for key in ("num_heads", "hidden_size", "input_size"))


def turned(x):
    """Rotate pairs of numbers as complex ones: half of a head by the row, half by the column."""
    half = WIDTH // HEADS // 2
    frequencies = 10000 ** (-torch.arange(0, half, 2) / half)
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
    angles = torch.cat([places[:, :1] * frequencies, places[:, 1:] * frequencies], 1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def lightningdit_velocity(state, latent, share, labels, qknorm=False):
    """The network of arXiv 2501.01423."""
    x, embedding = begun(state, latent, share, labels, 1)
    for number in range(LIGHTNINGDIT["depth"]):
        block = f"blocks.{number}"
        parts = linear(state, f"{block}.adaLN_modulation.1", embedding)[:, None].chunk(6, 2)
        inner = normed(state, f"{block}.norm1", x) * (1 + parts[1]) + parts[0]
        rows = linear(state, f"{block}.attn.qkv", inner)
        q, k, v = rows.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if qknorm:
            q, k = (normed(state, f"{block}.attn.{n}_norm", p) for n, p in (("q", q), ("k", k)))
        weights = (turned(q) @ turned(k).mT / q.shape[-1] ** 0.5).softmax(-1)
        mixed = linear(state, f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + parts[2] * mixed
        inner = normed(state, f"{block}.norm2", x) * (1 + parts[4]) + parts[3]
        gate, values = linear(state, f"{block}.mlp.w12", inner).chunk(2, 2)
        x = x + parts[5] * linear(state, f"{block}.mlp.w3", F.silu(gate) * values)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", embedding)[:, None].chunk(2, 2)
    x = normed(state, "final_layer.norm_final", x) * (1 + scale) + shift
    return linear(state, "final_layer.linear", x).mT.unflatten(2, (SIDE, SIDE))


def sampled(velocity, state, latent, label, guidance, steps, shift=1.0):
    """Euler's method from noise (share 0) to image (share 1), with guidance on three channels.

    Both makers guide so in ``forward_with_cfg``. The shift is of the shares.
    """
    even = torch.linspace(0, 1, steps + 1)
    shares = shift * even / (1 + (shift - 1) * even)
    none = len(state["y_embedder.embedding_table.weight"]) - 1
    classes, free = (torch.full((len(latent),), k) for k in (label, none))
    for share, following in itertools.pairwise(shares):
        own, other = (velocity(state, latent, share, labels) for labels in (classes, free))
        guided = torch.cat([(other + guidance * (own - other))[:, :3], own[:, 3:]], 1)
        latent = latent + (following - share) * guided
    return latent
