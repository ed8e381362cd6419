"""Low-rank weights (LoRA; Hu et al., arXiv 2106.09685): found, read, and added to a model's."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.checkpoints.hub import brief, damaged, explained, quiet

LORA = "pytorch_lora_weights.safetensors"
DIRECTIONS = {"down": "lora_A", "up": "lora_B"}
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings in the header of a file."""

DOWN = re.compile(r"(.+?)(\.lora_|_lora\.|\.lora\.|\.lora_linear_layer\.)(A|down)\.weight")
MAGNITUDE = "lora_magnitude_vector"
"""What DoRA adds to a layer (Liu et al., arXiv 2402.09353)."""

STARTS = ("gaussian", "eva", "orthogonal")
"""First values of adapters that leave the weights of the model as they are."""


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


@dataclass(frozen=True)
class LowRank:
    """The low-rank weights of a file, up already multiplied by alpha / rank.

    Attributes:
        path: the file.
        scale: how much of them to add.
        state: the tensors by name, without alphas.
        pairs: the names of down and up of each layer.
        rescaled: whether the metadata of the file changed the size of a layer's.
    """

    path: Path
    scale: float
    state: dict[str, Tensor]
    pairs: dict[str, tuple[str, str]]
    rescaled: bool

    def fingerprint(self) -> dict[str, str]:
        """Return what these weights add to a backbone's fingerprint."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        alphas = " × alpha / rank" if self.rescaled else ""  # which older versions ignored
        return {"lora": f"{digest} × {self.scale:g}{alphas}"}

    def check(self, changed: int) -> None:
        """Refuse weights if fewer layers of the model changed than are not zero in the file."""
        sides = ((self.state[key] for key in pair) for pair in self.pairs.values())
        wanted = sum(all(bool(side.any()) for side in pair) for pair in sides)
        if self.scale and changed < max(wanted, 1):
            raise misfit(self.path, f"{changed} of its {len(self.pairs)} layers change the model")


def misfit(path: Path, reason: str) -> UserError:
    """Build the error for low-rank weights of another model."""
    return UserError(
        f"expected a LoRA for this model, got {path}: {reason}; take the model that it was trained "
        "on"
    )


def read_lora(path: Path, scale: float) -> LowRank:
    """Read low-rank weights, with the alphas of its tensors or of its metadata.

    Takes what diffusers takes, and the attention processors of diffusers 0.20 and before
    (``….attn1.processor.to_q_lora.down.weight``).

    Args:
        path: a safetensors file.
        scale: how much of them to add.

    Raises:
        UserError: a damaged file, or one that holds something else, such as LoKr or LoHa.
    """
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise UserError(f"expected a finite number for lora_scale, got {scale!r}; 1 is usual")
    with damaged(path), safe_open(path, framework="pt") as file:
        state = {modern(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = dict(json.loads((file.metadata() or {}).get(METADATA, "{}")))
        pairs = {m[1]: (m[0], up_name(m)) for key in state if (m := DOWN.fullmatch(key))}
        known = {key for pair in pairs.values() for key in pair}
        known |= {f"{layer}.{extra}" for layer in pairs for extra in ("alpha", MAGNITUDE)}
        odd = [*(key for key in state if key not in known), *unknown_settings(config)]
        odd += [up for _, up in pairs.values() if up not in state]
        odd += [key for key, value in state.items() if not value.isfinite().all()]
        if odd or not pairs:
            raise UserError(
                f"expected a LoRA for this model, finite and whole, got {path} with "
                f"{(odd or ['none'])[0]}; give one whose layers are pairs such as lora_A and lora_B"
            )
        rescaled = False
        for layer, (_, up) in pairs.items():
            rank, alpha = state[up].shape[1], state.pop(f"{layer}.alpha", None)
            size = alpha_of(config, layer, rank) if alpha is None else alpha.item() / rank
            if size != 1:
                state[up] = state[up].float() * size
                rescaled |= alpha is None
    return LowRank(path, scale, state, pairs, rescaled)


def up_name(match: re.Match[str]) -> str:
    """Name the tensor that belongs to a match of `DOWN`."""
    return f"{match[1]}{match[2]}{'B' if match[3] == 'A' else 'up'}.weight"


def modern(key: str) -> str:
    """A LoRA's key in peft's words, if it is of an attention processor."""
    match = re.fullmatch(r"(?:unet\.)?(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight", key)
    if not match:
        return key
    layer = "to_out.0" if match[2] == "to_out" else match[2]
    return f"unet.{match[1]}.{layer}.{DIRECTIONS[match[3]]}.weight"


def unknown_settings(config: dict[str, Any]) -> list[str]:
    """List the settings of peft that change the weights of a model in another way."""
    starts = {k: v for k, v in config.items() if k.split(".")[-1] == "init_lora_weights"}
    return [f"{k}={v}" for k, v in starts.items() if isinstance(v, str) and v not in STARTS]


def alpha_of(config: dict[str, Any], layer: str, rank: int) -> float:
    """Compute alpha / rank of a layer, or alpha / √rank, by peft's settings; 1 without any.

    Args:
        config: peft's settings, as diffusers keeps them: of each part of a pipeline under its name,
            or of a network alone without.
        layer: its name, with the part's.
        rank: of its matrices.
    """
    part, _, place = layer.partition(".")

    def setting(name: str, default: Any) -> Any:
        return config.get(f"{part}.{name}", config.get(name, default))

    def fits(pattern: str) -> bool:  # as peft compares them: a name, or the end of one
        name = pattern.lstrip("^")
        return f".{layer}".endswith(f".{name}") or place == name

    patterns = setting("alpha_pattern", None) or {}
    alpha = next((patterns[key] for key in patterns if fits(key)), setting("lora_alpha", None))
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if setting("use_rslora", False) else rank)


def add_lora(pipe: Any, path: Path, scale: float) -> dict[str, str]:
    """Add low-rank weights to a pipeline's: W + scale·(alpha / rank)·up·down.

    Returns:
        What they add to the fingerprint.

    Raises:
        UserError: weights that diffusers refuses, or of which not all change this model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora, changed = read_lora(path, scale), 0
    with quiet():
        try:
            pipe.load_lora_weights(lora.state, adapter_name="lora")
        except Exception as error:  # of any type: peft and diffusers raise as they like
            raise misfit(path, brief(error)) from None
        networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        for layer in (layer for network in networks for layer in network.modules()):
            if isinstance(layer, BaseTunerLayer):
                weight: Any = layer.get_base_layer().weight
                before = weight.clone()
                layer.scale_layer(scale)  # type: ignore[operator]
                layer.merge()
                changed += not torch.equal(weight, before)
        pipe.unload_lora_weights()
    lora.check(changed)
    return lora.fingerprint()


def fuse_lora(network: nn.Module, path: Path, scale: float) -> dict[str, str]:
    """Add low-rank weights to linear layers, as `add_lora`, of a network that is no pipeline's.

    Returns:
        What they add to the fingerprint.

    Raises:
        UserError: weights of which not all change this network.
    """
    lora, changed = read_lora(path, scale), 0
    known = {key for pair in lora.pairs.values() for key in pair}
    reason = next((key for key in lora.state if key not in known), "")
    try:
        for layer, pair in lora.pairs.items():
            down, up = (lora.state[key].float() for key in pair)
            weight, product = (
                network.get_parameter(f"{layer.removeprefix('unet.')}.weight"),
                up @ down,
            )
            if product.shape != weight.shape:
                reason = f"{layer} of {tuple(product.shape)} for {tuple(weight.shape)}"
                break
            before = weight.clone()
            with torch.no_grad():
                weight.add_(scale * product)
            changed += not torch.equal(weight, before)
    except (AttributeError, RuntimeError) as error:
        reason = brief(error)
    if reason:
        raise misfit(path, reason)
    lora.check(changed)
    return lora.fingerprint()
