"""Networks of timm, by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from augment.diffusion.hub import brief, explained
from augment.errors import UserError
from augment.networks.frozen import in_batches, normalise


def timm_network(
    name: str, weights: str, classes: int, device: torch.device
) -> Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n d"]]:
    """A network of timm, as a function of images in [0, 1]: logits, or features without a head.

    Images are brought to the size, mean and standard deviation of timm's configuration of the
    network. Weights whose names begin with ``network.`` were trained by
    `training.classifier.Classifier`: the images keep their size, less 0.5, times 4.

    Args:
        name: such as ``resnet50`` or ``convnext_tiny.fb_in1k``.
        weights: a ``.safetensors`` file of its state dict; empty takes timm's pretrained ones.
        classes: how many logits; 0 leaves out the head.
        device: where it runs.

    Raises:
        UserError: timm is missing or does not know the name, or the weights are missing, of
            another network or of another number of classes.
    """
    timm = find_timm(name)
    from timm.data import resolve_model_data_config  # type: ignore[attr-defined]

    state, own = read_state(weights) if weights else ({}, False)
    with torch.random.fork_rng(devices=[]):  # timm throws first weights with the global generator
        network = build(timm, name, classes, weights, state)
    network.eval().requires_grad_(False).to(device)
    given = resolve_model_data_config(network)
    size, mean, std = given["input_size"][1:], given["mean"], given["std"]
    form = (None, (0.5,), (0.25,)) if own else (size, mean, std)
    channels = channels_of(timm, name, state)

    def run(images: Tensor) -> Tensor:
        inputs = normalise(images.to(device), channels, *form, mode=given["interpolation"])
        return network(inputs).flatten(1)

    return lambda images: in_batches(run, images)


def find_timm(name: str, known: str = "a network of timm") -> Any:
    """The library, if it has a network of this name.

    Args:
        name: of the network.
        known: what may be named, for the error.

    Raises:
        UserError: timm is missing, or does not know the name.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(
            f"expected timm for the network {name!r}, got none; pip install 'latent-augment[train]'"
        ) from None
    if not timm.is_model(name):
        raise UserError(f"expected {known}, got {name!r}; see timm.list_models()")
    return timm


def read_state(path: str) -> tuple[dict[str, Tensor], bool]:
    """A state dict, and whether it is of our own classifier, whose prefix it loses.

    Raises:
        UserError: there is no such file, or it is no safetensors.
    """
    try:
        state = load_file(Path(path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"expected weights in a .safetensors file, got {path} ({brief(error)}); save a state "
            "dict with safetensors.torch.save_file"
        ) from None
    prefix = "network."
    inner = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
    return (inner, True) if inner else (state, False)


def check_classes(found: int, classes: int, source: str) -> None:
    """Refuse a network for other classes than the bank's."""
    if found != classes:
        raise UserError(
            f"expected a network for the bank's {classes} classes, got {source} for {found}; give "
            "weights that were trained on them, or take the filter prototype, which needs none"
        )


def channels_of(timm: Any, name: str, state: dict[str, Tensor]) -> int:
    """The channels that weights are for; 3 if their first layer does not tell."""
    first = state.get(f"{timm.get_pretrained_cfg(name).first_conv}.weight")
    return 3 if first is None else first.shape[1]


def build(timm: Any, name: str, classes: int, path: str, state: dict[str, Tensor]) -> nn.Module:
    """A network with its weights: those of a file, or timm's."""
    plan = timm.get_pretrained_cfg(name)
    heads = (plan.classifier,) if isinstance(plan.classifier, str) else plan.classifier or ()
    if classes:
        rows = [len(state[key]) for key in (f"{head}.weight" for head in heads) if key in state]
        check_classes(rows[0] if rows else 0 if path else plan.num_classes, classes, path or name)
    else:
        state = {k: v for k, v in state.items() if not k.startswith(tuple(f"{h}." for h in heads))}
    try:
        if not path:
            with explained(f"timm/{name}"):
                return timm.create_model(name, pretrained=True, num_classes=classes)
        channels = channels_of(timm, name, state)
        network = timm.create_model(name, num_classes=classes, in_chans=channels)
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"expected weights of {name}, got {path or 'none of timm'}: {brief(error)}; give those "
            "of this network, or name theirs"
        ) from None
    return network
