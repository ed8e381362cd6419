"""Low-rank weights (LoRA; Hu et al., arXiv 2106.09685): found, read, added to a model, trained."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.checkpoints.hub import REPOSITORY, brief, damaged, explained, quiet

LORA = "pytorch_lora_weights.safetensors"
_DIRECTIONS = {"down": "lora_A", "up": "lora_B"}
METADATA = "lora_adapter_metadata"
"""Key of peft's settings in the header of a file that diffusers wrote."""

_DOWN = re.compile(r"(.+?)(\.lora_|_lora\.|\.lora\.|\.lora_linear_layer\.)(A|down)\.weight")
_MAGNITUDE = "lora_magnitude_vector"  # of a layer with DoRA (Liu et al., arXiv 2402.09353)
_STARTS = ("gaussian", "eva", "orthogonal")
"""Initial values of adapters that leave the weights of the model as they are."""


def find_lora(source: str | Path, local_files_only: bool = False) -> Path:
    """Find the file of a LoRA: itself, or ``pytorch_lora_weights`` of a folder or repository.

    Raises:
        UserError: no such file, or no safetensors.
    """
    path = Path(source)
    if path.is_dir():
        path /= LORA
    elif path.suffix != ".safetensors" and re.fullmatch(REPOSITORY, str(source)):
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
class _LowRank:
    """The low-rank weights of a file, up already multiplied by alpha / rank.

    Attributes:
        path: the file.
        scale: factor of the weights.
        state: tensors by name, without alphas.
        pairs: names of down and up of each layer.
        rescaled: whether the metadata of the file rescaled a layer.
    """

    path: Path
    scale: float
    state: dict[str, Tensor]
    pairs: dict[str, tuple[str, str]]
    rescaled: bool

    def finish(self, changed: int) -> dict[str, str]:
        """Return the entry in a backbone's fingerprint, after ``changed`` layers have changed.

        Raises:
            UserError: these are fewer than have non-zero weights in the file.
        """
        sides = ((self.state[key] for key in pair) for pair in self.pairs.values())
        wanted = sum(all(bool(side.any()) for side in pair) for pair in sides)
        if self.scale and changed < max(wanted, 1):
            raise self.misfit(f"{changed} of its {len(self.pairs)} layers change the model")
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        alphas = " × alpha / rank" if self.rescaled else ""  # older versions ignored them
        return {"lora": f"{digest} × {self.scale:g}{alphas}"}

    def misfit(self, reason: str) -> UserError:
        """Build the error for low-rank weights of another model."""
        return UserError(
            f"expected a LoRA for this model, got {self.path}: {reason}; take the model that it "
            "was trained on"
        )


def _read_lora(path: Path, scale: float) -> _LowRank:
    """Read low-rank weights from a safetensors file, with the alphas of its tensors or metadata.

    Takes the same files as diffusers, and the attention processors of diffusers 0.20 and before
    (``….attn1.processor.to_q_lora.down.weight``).

    Raises:
        UserError: a damaged file, or one of another kind, such as LoKr or LoHa.
    """
    if not math.isfinite(scale):
        raise UserError(f"expected a finite number for lora_scale, got {scale!r}; 1 is usual")
    with damaged(path), safe_open(path, framework="pt") as file:
        state = {_modern(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = dict(json.loads((file.metadata() or {}).get(METADATA, "{}")))
        matches = [match for key in state if (match := _DOWN.fullmatch(key))]
        ups = {"A": "B", "down": "up"}
        pairs = {m[1]: (m[0], f"{m[1]}{m[2]}{ups[m[3]]}.weight") for m in matches}
        known = {key for pair in pairs.values() for key in pair}
        known |= {f"{layer}.{extra}" for layer in pairs for extra in ("alpha", _MAGNITUDE)}
        odd = [*(key for key in state if key not in known), *_unknown_settings(config)]
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
            size = _alpha_of(config, layer, rank) if alpha is None else alpha.item() / rank
            if size != 1:
                state[up] = state[up].float() * size
                rescaled |= alpha is None
    return _LowRank(path, scale, state, pairs, rescaled)


def _modern(key: str) -> str:
    """Rename a key of an attention processor to peft's name."""
    match = re.fullmatch(r"(?:unet\.)?(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight", key)
    if not match:
        return key
    layer = "to_out.0" if match[2] == "to_out" else match[2]
    return f"unet.{match[1]}.{layer}.{_DIRECTIONS[match[3]]}.weight"


def _unknown_settings(config: Mapping[str, object]) -> list[str]:
    """List the settings of peft that change the weights of a model in another way."""
    starts = {k: v for k, v in config.items() if k.split(".")[-1] == "init_lora_weights"}
    return [f"{k}={v}" for k, v in starts.items() if isinstance(v, str) and v not in _STARTS]


def _alpha_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Compute alpha / rank of a layer, or alpha / √rank, by peft's settings; 1 without any.

    Diffusers writes the settings of a pipeline's parts with their names as prefixes, and those of a
    network alone without.
    """
    part, _, place = layer.partition(".")

    def setting(name: str, default: object) -> Any:
        return config.get(f"{part}.{name}", config.get(name, default))

    def fits(pattern: str) -> bool:  # as peft compares them: a name, or the end of one
        name = pattern.lstrip("^")
        return f".{layer}".endswith(f".{name}") or place == name

    patterns = setting("alpha_pattern", None) or {}
    alpha = next((patterns[key] for key in patterns if fits(key)), setting("lora_alpha", None))
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if setting("use_rslora", False) else rank)


def serialized(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return low-rank weights as a safetensors file, the same bytes every time.

    safetensors itself writes several entries of metadata in any order.
    """
    content = save(dict(state))
    size = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(content[8 : 8 + size])}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def add_lora(pipe: Any, path: Path, scale: float) -> dict[str, str]:
    """Add low-rank weights to a pipeline's: W + scale·(alpha / rank)·up·down.

    Returns:
        The entry in the fingerprint.

    Raises:
        UserError: diffusers refuses the weights, or not all of them change this model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora, changed = _read_lora(path, scale), 0
    state = {_as_in(pipe, key): value for key, value in lora.state.items()}
    with quiet():
        try:
            pipe.load_lora_weights(state, adapter_name="lora")
        except Exception as error:  # of any type, since files may be hostile
            raise lora.misfit(brief(error)) from None
        networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        layers = (layer for network in networks for layer in network.modules())
        tuned: list[Any] = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
        for layer in tuned:
            weight = layer.get_base_layer().weight
            before = weight.clone()
            layer.scale_layer(scale)
            layer.merge()
            changed += not torch.equal(weight, before)
        pipe.unload_lora_weights()
    return lora.finish(changed)


def _as_in(pipe: Any, key: str) -> str:
    """Rename the key of a text encoder's layer to the place that it has in a pipeline.

    Since transformers 5.6 a CLIPTextModel has no part ``text_model`` any more, while
    CLIPTextModelWithProjection has; files of either layout are about.
    """
    part, _, layer = key.partition(".")
    if not re.fullmatch(r"text_encoder(_2)?", part):
        return key
    wrapped = hasattr(getattr(pipe, part, None), "text_model")
    return f"{part}.{'text_model.' if wrapped else ''}{layer.removeprefix('text_model.')}"


def fuse_lora(network: nn.Module, path: Path, scale: float) -> dict[str, str]:
    """Add low-rank weights to the linear layers of a network outside a pipeline; see `add_lora`."""
    lora, changed = _read_lora(path, scale), 0
    known = {key for pair in lora.pairs.values() for key in pair}
    if unknown := [key for key in lora.state if key not in known]:
        raise lora.misfit(unknown[0])
    for layer, pair in lora.pairs.items():
        try:
            down, up = (lora.state[key].float() for key in pair)
            weight = network.get_parameter(f"{re.sub('^(unet|transformer)[.]', '', layer)}.weight")
            product = up @ down
        except (AttributeError, RuntimeError) as error:
            raise lora.misfit(brief(error)) from None
        if product.shape != weight.shape:
            raise lora.misfit(f"{layer} of {tuple(product.shape)} for {tuple(weight.shape)}")
        before = weight.clone()
        with torch.no_grad():
            weight.add_(scale * product)
        changed += not torch.equal(weight, before)
    return lora.finish(changed)


def inject_adapters(network: nn.Module, rank: int, targets: str | Sequence[str]) -> nn.Module:
    """Freeze a network but for low-rank adapters of peft, which at first change nothing.

    Args:
        network: changed in place.
        rank: of the adapters, and their alpha.
        targets: ends of the names of layers, or a regular expression of whole names.

    Raises:
        UserError: peft is not installed, or it has no adapter for a layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise UserError(
            "expected peft for LoRA, got none; pip install 'latent-augment[train]'"
        ) from None
    names = targets if isinstance(targets, str) else list(targets)
    try:
        return inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=names), network
        )
    except ValueError as error:
        raise UserError(f"expected layers that LoRA fits, got: {error}; choose others") from None
