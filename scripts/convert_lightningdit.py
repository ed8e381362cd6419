"""Make a folder for `load_backbone` of the files that LightningDiT's makers publish.

    python scripts/convert_lightningdit.py lightningdit-xl-imagenet256-800ep.pt \
        vavae-imagenet256-f16d32-dinov2.pt latents_stats.pt lightningdit

The three files are of huggingface.co/hustvl, or of a training with github.com/hustvl/LightningDiT.
They are pickles, of which only tensors are read. The autoencoder has the layers of *High-Resolution
Image Synthesis with Latent Diffusion Models* (arXiv 2112.10752) by the names of its code; diffusers
has the same layers by other names.
"""

import argparse
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from augment.core.errors import UserError

SHIFT = 0.3
"""``timestep_shift`` of the makers' sampler."""

_RENAMED = (
    (r"\bmid\.block_1\b", "mid_block.resnets.0"),
    (r"\bmid\.block_2\b", "mid_block.resnets.1"),
    (r"\bmid\.attn_1\b", "mid_block.attentions.0"),
    (r"\b(down|up)\.(\d+)\.block\b", r"\1_blocks.\2.resnets"),
    (r"\b(down|up)\.(\d+)\.attn\b", r"\1_blocks.\2.attentions"),
    (r"\b(down|up)\.(\d+)\.\1sample\b", r"\1_blocks.\2.\1samplers.0"),
    (r"\bnin_shortcut\b", "conv_shortcut"),
    (r"\bnorm_out\b", "conv_norm_out"),
    (r"(attentions\.\d+)\.norm\b", r"\1.group_norm"),
    (r"(attentions\.\d+)\.([qkv])\b", r"\1.to_\2"),
    (r"(attentions\.\d+)\.proj_out\b", r"\1.to_out.0"),
)
"""Patterns of the names of an autoencoder's layers, and diffusers' names."""


def read(path: Path) -> dict[str, Any]:
    """Read the tensors of a pickle, those of ``ema`` or ``state_dict`` if it has such."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"expected a file of tensors, got {path}: {reason}; download it again"
        ) from None
    for key in ("ema", "state_dict"):
        found = found.get(key, found)
    return found


def network_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Read the size of a network from the shapes of its weights."""
    width, patch = state["x_embedder.proj.weight"].shape[::2]
    channels = state["x_embedder.proj.weight"].shape[1]
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    turns = state.get("feat_rope.freqs_cos")
    return {
        "_class_name": "LightningDiTTransformer2DModel",
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len(blocks),
        "num_heads": 16 if turns is None else width // turns.shape[1],
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": len(state["final_layer.linear.weight"]) != patch**2 * channels,
        "use_rope": turns is not None,
        "use_swiglu": "blocks.0.mlp.w12.weight" in state,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in state,
        "wo_shift": len(state["blocks.0.adaLN_modulation.1.weight"]) == 4 * width,
    }


def autoencoder(state: dict[str, Tensor], statistics: dict[str, Tensor]) -> Any:
    """Build diffusers' autoencoder with weights by the names of latent diffusion's code.

    Args:
        state: weights; those of other networks, as of a loss, are left out.
        statistics: ``mean`` and ``std`` of the latents, (1, channels, 1, 1).
    """
    import diffusers

    kind: Any = diffusers.AutoencoderKL

    def sizes(pattern: str) -> list[int]:
        found = (re.fullmatch(pattern, key) for key in state)
        keys = sorted((int(match[1]), match[0]) for match in found if match)
        return [len(state[key]) for _, key in keys]

    widths = sizes(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    attends = [f"encoder.down.{n}.attn.0.norm.weight" in state for n in range(len(widths))]
    down = [f"{'Attn' if own else ''}DownEncoderBlock2D" for own in attends]
    up = [f"{'Attn' if own else ''}UpDecoderBlock2D" for own in reversed(attends)]
    vae = kind(
        block_out_channels=tuple(widths),
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        layers_per_block=len(sizes(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")),
        latent_channels=len(state["post_quant_conv.weight"]),
        latents_mean=statistics["mean"].flatten().tolist(),
        latents_std=statistics["std"].flatten().tolist(),
        scaling_factor=1.0,
    )
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            continue
        name = re.sub(r"(?<=\bup\.)\d+", lambda m: str(len(widths) - 1 - int(m[0])), key)
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        flat = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)
        named[name] = value.flatten(1) if flat else value
    vae.load_state_dict(named)
    return vae


def convert(network: Path, vae: Path, statistics: Path, folder: Path) -> None:
    """Write the folder.

    Raises:
        UserError: a file that cannot be read or has other weights, or a folder that is there.
    """
    state = read(network)
    try:
        config = network_config(state)
        codec = autoencoder(read(vae), read(statistics))
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"expected a LightningDiT, its VA-VAE and their latents_stats.pt, got {error!s:.160}; "
            "give these three files in this order"
        ) from None
    if folder.exists():
        raise UserError(f"expected a new folder, got {folder}; choose another or remove it")
    (folder / "transformer").mkdir(parents=True)
    weights = {key: value.contiguous() for key, value in state.items() if value.ndim}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    codec.save_pretrained(folder / "vae")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": SHIFT}
    index = {
        "_class_name": "LightningDiTPipeline",
        "transformer": ["transformer_lightningdit", config["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    (folder / "scheduler").mkdir()
    for place, record in (
        ("transformer/config.json", config),
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", index),
    ):
        (folder / place).write_text(json.dumps(record, indent=1))


def main() -> None:
    """Convert the files that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("network", "vae", "statistics", "folder"):
        parser.add_argument(name, type=Path)
    try:
        convert(**vars(parser.parse_args()))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
