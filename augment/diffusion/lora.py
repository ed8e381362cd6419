"""Low-rank weights (LoRA; Hu et al., arXiv 2106.09685): found, renamed, and added to a pipeline."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from augment.diffusion.hub import brief, damaged, explained, quiet
from augment.errors import UserError

LORA = "pytorch_lora_weights.safetensors"
DIRECTIONS = {"down": "lora_A", "up": "lora_B"}


def find_lora(source: str | Path, local_files_only: bool = False) -> Path:
    """The file of a LoRA: itself, a folder's or a repository's ``pytorch_lora_weights``.

    Raises:
        UserError: no such file, or no safetensors.
    """
    path = Path(source)
    if path.is_dir():
        path /= LORA
    elif path.suffix != ".safetensors" and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        from huggingface_hub import hf_hub_download

        with explained(str(source)):
            path = Path(hf_hub_download(str(source), LORA, local_files_only=local_files_only))
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(
            f"expected a LoRA in a .safetensors file or a folder with {LORA}, got {path}, which is "
            "no such file"
        )
    return path


def lora_print(path: Path, scale: float) -> dict[str, str]:
    """What low-rank weights add to a backbone's fingerprint."""
    return {"lora": f"{hashlib.sha256(path.read_bytes()).hexdigest()} × {scale:g}"}


def add_lora(pipe: Any, path: Path, scale: float) -> None:
    """Add low-rank weights to a pipeline's: W + scale·up·down (Hu et al., arXiv 2106.09685).

    Takes what diffusers takes, and the attention processors of diffusers 0.20 and before
    (``….attn1.processor.to_q_lora.down.weight``).

    Raises:
        UserError: weights that have no place in this model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with damaged(path):
        state = {modern(key): value for key, value in load_file(path).items()}
    wanted = sum(bool(re.search(r"(lora_A|down)\.weight$", key)) for key in state)
    reason = f"{wanted} layers of low rank"
    with quiet():
        try:
            pipe.load_lora_weights(state, adapter_name="lora")
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            reason = brief(error)
        networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        layers = [layer for network in networks for layer in network.modules()]
        placed = sum(isinstance(layer, BaseTunerLayer) for layer in layers)
        if placed < max(wanted, 1):
            raise UserError(
                f"expected a LoRA for this model, got {path}, of which {placed} layers have a "
                f"place in it: {reason}; take the model that it was trained on"
            )
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()


def fuse_lora(network: nn.Module, path: Path, scale: float) -> None:
    """Add low-rank weights to linear layers, as `add_lora`, of a network that is no pipeline's.

    Raises:
        UserError: weights that have no place in this network.
    """
    with damaged(path):
        state = {modern(key).removeprefix("unet."): v for key, v in load_file(path).items()}
    places = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
    try:
        for place in places:
            down, up = (state.pop(f"{place}.lora_{side}.weight") for side in "AB")
            with torch.no_grad():
                network.get_parameter(f"{place}.weight").add_(scale * up.float() @ down.float())
        reason = next(iter(state), "" if places else "no weights at all")
    except (AttributeError, KeyError, RuntimeError) as error:
        reason = brief(error)
    if reason:
        raise UserError(
            f"expected a LoRA for this model, got {path}, which has no place in it: {reason}; "
            "take the model that it was trained on"
        )


def modern(key: str) -> str:
    """A LoRA's key in peft's words, if it is of an attention processor."""
    match = re.fullmatch(r"(?:unet\.)?(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight", key)
    if not match:
        return key
    layer = "to_out.0" if match[2] == "to_out" else match[2]
    return f"unet.{match[1]}.{layer}.{DIRECTIONS[match[3]]}.weight"
