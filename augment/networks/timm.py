"""Networks of timm, by name."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.checkpoints.hub import brief, explained
from augment.networks.frozen import in_batches, normalise

_TRAINED = "augment.training.episodes.features"
"""The module that opens checkpoints of `Classifier`; by name, since it lies layers above."""

SOURCE_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of timm's names of models in a repository or a folder."""


Settings = dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """The content of a file of weights.

    Args:
        state: state dict of the network.
        mean_std: (2, channels), mean and deviation of the pixels; None if the file has none.
        settings: hyperparameters of a `augment.training.models.classifier.Classifier`; empty for
            other files.
        own: whether a `augment.training.models.classifier.Classifier` wrote them.
        record: everything in the file.
    """

    state: dict[str, Tensor]
    mean_std: Tensor | None
    settings: Settings
    own: bool
    record: Settings

    def pixels(self, network: nn.Module, channels: int) -> Float[Tensor, "2 c"]:
        """Return mean and deviation of the pixels; those of timm's network if the file has none."""
        if self.mean_std is not None:
            return self.mean_std
        plain = self.own and not self.settings.get("pretrained")  # of an older version
        return mean_std(None if plain else network, channels)


def read_weights(path: str, device: torch.device | str = "cpu") -> Weights:
    """Read a state dict from a ``.safetensors`` file, a file of torch or a checkpoint of training.

    Args:
        path: the file; nothing is unpickled but tensors and plain values.
        device: of the tensors.

    Raises:
        UserError: the file cannot be read, or has no state dict.
    """
    try:
        if not Path(path).is_file():  # a pipe would never end
            raise FileNotFoundError(errno.ENOENT, "no such file")
        if path.endswith(".safetensors"):
            record: Any = load_file(Path(path))
        else:
            record = torch.load(Path(path), map_location=device, weights_only=True)
        settings = dict(record.get("hyper_parameters", {}))
        state = next((record[k] for k in ("state_dict", "model") if k in record), record)
        state = {k.removeprefix("module."): v for k, v in state.items()}
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("no state dict")
    except Exception as error:  # of any type, since files may be hostile
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            "expected weights as a checkpoint of latent-augment train, a state dict or a "
            f".safetensors file, got {path} ({reason}); save a state dict of tensors alone"
        ) from None
    prefix = "network."
    inner = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
    rows = state.get("mean_std") if inner else None
    return Weights(inner or state, rows, settings, bool(inner), record)


def mean_std(network: nn.Module | None, channels: int) -> Float[Tensor, "2 c"]:
    """Return the mean and deviation of the pixels that a network of timm was trained with.

    Args:
        network: the network; None or one without a configuration gives 0.5 and 0.25.
        channels: of the images; if the weights are for another number, the mean over those.
    """
    config = getattr(network, "pretrained_cfg", {})
    rows = torch.tensor([config.get("mean", (0.5,)), config.get("std", (0.25,))])
    return rows if rows.shape[1] == channels else rows.mean(1, keepdim=True).repeat(1, channels)


def timm_network(
    name: str, weights: str, classes: int, device: torch.device
) -> Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n d"]]:
    """Load a network of timm as a function of images in [0, 1]: logits, or features without a head.

    Images are brought to the size, mean and standard deviation of timm's configuration of the
    network. Weights of a `augment.training.models.classifier.Classifier` have their own mean and
    deviation; a whole checkpoint (``.ckpt``) has channels and resolution too, and may be of any
    network. A bare state dict of it, whose names begin with ``network.``, keeps the images' size,
    and has mean 0.5 and deviation 0.25 if it has no ``mean_std``.

    Args:
        name: such as ``resnet50``, ``convnext_tiny.fb_in1k``, ``hf-hub:USER/MODEL`` or
            ``local-dir:FOLDER``; empty for a checkpoint's own.
        weights: a ``.safetensors`` file, a state dict or a checkpoint; empty for timm's.
        classes: number of logits; 0 leaves out the head.
        device: of the network.

    Raises:
        UserError: timm is missing or does not know the name, or the weights are missing, of
            another network or of another number of classes.
    """
    given = read_weights(weights) if weights else Weights({}, None, {}, False, {})
    if given.settings:
        return import_module(_TRAINED).frozen_classifier(name, weights, classes, device)
    if not name:
        raise UserError(f"expected the name of a network for {weights or 'timm'}, got none")
    timm = find_timm(name)
    from timm.data.config import resolve_model_data_config

    with torch.random.fork_rng(devices=[]):  # timm draws first weights from the global generator
        network = _build(timm, name, classes, weights, given.state)
    network.eval().requires_grad_(False).to(device)
    config = resolve_model_data_config(network)
    channels = _channels_of(network.pretrained_cfg, given.state)
    size = None if given.own else config["input_size"][1:]
    mean, std = given.pixels(network, channels).tolist()

    def run(images: Tensor) -> Tensor:
        inputs = normalise(images.to(device), channels, size, mean, std, config["interpolation"])
        return network(inputs).flatten(1)

    return lambda images: in_batches(run, images)


def network_of(name: str | None, weights: str, usual: str) -> str:
    """Return the name of a network: as given, or empty for a checkpoint, which knows, or the usual.

    >>> network_of(None, "run/last.ckpt", "resnet50"), network_of(None, "", "resnet50")
    ('', 'resnet50')
    """
    return ("" if weights.endswith(".ckpt") else usual) if name is None else name


def find_timm(name: str, kinds: str = "a network of timm") -> ModuleType:
    """Import timm, if it has a network of this name.

    Args:
        name: of the network.
        kinds: of networks that may be named, for the error.

    Raises:
        UserError: timm is missing, or does not know the name.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(
            f"expected timm for the network {name!r}, got none; pip install 'latent-augment[train]'"
        ) from None
    if not name.startswith(SOURCE_PREFIXES) and not timm.is_model(name):
        raise UserError(f"expected {kinds}, got {name!r}; see timm.list_models()")
    return timm


def recipe(name: str) -> tuple[str, Settings, Settings]:
    """Return architecture, options and configuration of a network of timm, repository or folder.

    Raises:
        OSError, RuntimeError: there is none, or it cannot be downloaded.
    """
    from timm.models import _hub, get_pretrained_cfg

    if not name.startswith(SOURCE_PREFIXES):
        config = get_pretrained_cfg(name)
        return name, {}, config.to_dict() if config else {}
    source, _, place = name.partition(":")
    local = source == "local-dir"
    load = _hub.load_model_config_from_path if local else _hub.load_model_config_from_hf
    config, architecture, options = load(place)
    trained = ("num_classes", "in_chans")
    return architecture, {k: v for k, v in options.items() if k not in trained}, config


def check_classes(outputs: int, classes: int, source: str) -> None:
    """Refuse a network for other classes than the bank's."""
    if outputs != classes:
        raise UserError(
            f"expected a network for the bank's {classes} classes, got {source} for {outputs}; "
            "give weights that were trained on them, or take the filter prototype, which needs none"
        )


def other_classes(trained: Sequence[str] | None, given: Sequence[str] | None) -> str:
    """Describe how given classes differ from trained ones; empty if not, or if either is None.

    >>> other_classes(["ant", "bee"], ["bee", "cow"]), other_classes(["a", "b"], ["b", "a"])
    ('cow new, ant missing', 'another order, b, a')
    """
    if trained is None or given is None or list(trained) == list(given):
        return ""
    new, old = set(given), set(trained)
    parts = (
        ("new", [n for n in given if n not in old]),
        ("missing", [n for n in trained if n not in new]),
    )
    words = [
        f"{', '.join(names[:5])}{' …' * (len(names) > 5)} {word}" for word, names in parts if names
    ]
    return ", ".join(words) or f"another order, {', '.join(list(given)[:5])}"


def check_names(trained: Sequence[str] | None, given: Sequence[str] | None, source: str) -> None:
    """Refuse images of other classes, or in another order, than weights were trained for."""
    problem = other_classes(trained, given)
    if problem:
        raise UserError(
            f"expected the {len(trained or ())} classes of {source} in their order, got {problem}; "
            "give images of these classes, in folders of these names, or train anew elsewhere"
        )


def _channels_of(config: Settings, state: dict[str, Tensor]) -> int:
    """Return the channels that weights are for; 3 if their first layer is unknown."""
    first = state.get(f"{config.get('first_conv')}.weight")
    return 3 if first is None else first.shape[1]


def _build(timm: ModuleType, name: str, classes: int, path: str, state: dict[str, Tensor]) -> Any:
    """Build a network with its weights: those of a file, or timm's."""
    source = name if name.startswith(SOURCE_PREFIXES) else f"timm/{name}"
    with explained(source):
        _, _, config = recipe(name)
    named = config.get("classifier") or ()
    heads = (named,) if isinstance(named, str) else named
    if classes:
        rows = [len(state[key]) for key in (f"{head}.weight" for head in heads) if key in state]
        outputs = rows[0] if rows else 0 if path else config["num_classes"]
        check_classes(outputs, classes, path or name)
    else:
        state = {k: v for k, v in state.items() if not k.startswith(tuple(f"{h}." for h in heads))}
    try:
        if not path:
            with explained(source):
                return timm.create_model(name, pretrained=True, num_classes=classes)
        channels = _channels_of(config, state)
        network = timm.create_model(name, num_classes=classes, in_chans=channels)
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"expected weights of {name}, got {path or 'none of timm'}: {brief(error)}; give those "
            "of this network, or name theirs"
        ) from None
    return network
