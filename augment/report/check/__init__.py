"""The check of an installation: does a model do here what it should, and how fast?

A model is loaded and used as the commands use it. What is found is a list of `Line`: *as expected*
or *not as expected* with the reason. `augment.report.check.stages` judges the codec, the network,
each inversion and centroids by rule; `augment.report.check.speed` measures time and memory, beside
the machine's matrix products and diffusers' own pipeline.
"""

import importlib.metadata
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from augment import __version__
from augment.bank.bank import LatentBank
from augment.core.errors import AugmentWarning, BiasWarning, UserError
from augment.core.files import JsonObject
from augment.diffusion import find_device, load_backbone, parse_dtype
from augment.diffusion.backbone import check_batch
from augment.diffusion.checkpoints.hub import brief
from augment.diffusion.solver import check_steps
from augment.inversion import INVERTERS, inverter
from augment.report.check.speed import beside_diffusers, memory, speed
from augment.report.check.stages import centroids, codec, inversion, network
from augment.report.check.subject import Line, Subject
from augment.sources import Folder, as_source
from augment.sources.fashion import write_fashion
from augment.sources.source import Source
from augment.sources.subsets import Selection

__all__: list[str] = []

IMAGES = 8
"""Maximum number of images that are inverted."""

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub")
"""Packages whose versions are printed."""


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What to check, and where.

    Args:
        backbone: diffusion model; see augment.load_backbone.
        images: folder with images by class, or another source as for invert, of which the first 8
            of the first class are taken; by default three landscapes that come with the package.
        steps: solver steps; by default those of the model's family.
        batch_size: images at a time when speed is measured; by default 16 on a GPU, 4
            above 512 pixels, and 3 on a CPU.
        out: PNG file to write, a sheet of centroids by rule.
        device: device such as cuda or cpu; by default the GPU if there is one.
        dtype: precision of the network: float32, float16 or bfloat16; by default half on a GPU.
        backbone_options: options of the backbone, as YAML.
    """

    backbone: str = "tiny"
    images: Source | str | None = None
    steps: int | None = None
    batch_size: int | None = None
    out: str | None = None
    device: str | None = None
    dtype: str | None = None
    backbone_options: JsonObject | None = None


def run_check(settings: CheckSettings, tell: Callable[[Line], Any] = print) -> JsonObject:
    """Check a model; return the record.

    Args:
        settings: see `CheckSettings`.
        tell: called with each line when it is known.

    Raises:
        UserError: settings or images that cannot be used.
    """
    check_steps(settings.steps or 1)
    check_batch(settings.batch_size or 1)
    device, dtype = find_device(settings.device), parse_dtype(settings.dtype)
    given = None if settings.images is None else as_source(settings.images)
    lines: list[Line] = []

    def add(line: Line) -> None:
        lines.append(line)
        tell(line)

    def add_warnings() -> None:
        """Add what the model was warned of; a rule's bias is a matter of the images."""
        kinds = (w for w in caught if issubclass(w.category, AugmentWarning))
        for text in dict.fromkeys(str(w.message) for w in kinds if w.category is not BiasWarning):
            add(Line("warning", "of the commands that were run", False, text))
        caught.clear()

    started = time.monotonic()
    add(machine(device))
    with warnings.catch_warnings(record=True) as caught, TemporaryDirectory() as place:
        warnings.simplefilter("always")
        try:
            options = settings.backbone_options or {}
            backbone = load_backbone(settings.backbone, device, dtype, **options)
        except UserError as error:
            add(Line("model", settings.backbone, False, str(error)))
        else:
            add_warnings()
            source = pictures(given, backbone.channels, Path(place))
            subject = Subject(backbone, source, settings.steps or 0, settings.batch_size or 0)
            for line in stages(subject, Path(place), settings.out):
                add(line)
            add_warnings()
    good = all(line.expected is not False for line in lines)
    seconds = time.monotonic() - started
    count = sum(line.expected is False for line in lines)
    verdict = "everything is as expected" if good else f"{count} not as expected"
    add(Line("verdict", f"{verdict}, {seconds:.0f} s", good))
    return {
        "as_expected": good,
        "backbone": settings.backbone,
        "seconds": round(seconds, 1),
        "lines": [_as_json(asdict(line)) for line in lines],
    }


def stages(subject: Subject, place: Path, out: str | None) -> Iterator[Line]:
    """Yield what is found of a model, stage by stage.

    Args:
        subject: the model.
        place: folder to put banks below.
        out: PNG file for the sheet of centroids.
    """
    banks: list[LatentBank] = []
    yield subject.about()
    yield from guarded("codec", partial(codec, subject))
    yield from guarded("network", partial(network, subject))
    for name in INVERTERS:
        if name != "noise" and (subject.prompt or inverter(name).negative == "empty"):
            yield from guarded(name, partial(inversion, subject, name, place / name, banks))
    if banks:
        yield from guarded("centroids", partial(centroids, subject, banks[0], out))
    yield from guarded("speed", partial(speed, subject))
    yield from guarded("diffusers", partial(beside_diffusers, subject))
    yield from memory(subject)


def guarded(topic: str, find: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """Yield what is found; an error of any kind becomes a line, and the check goes on."""
    try:
        yield from find()
    except UserError as error:
        yield Line(topic, "not measured", False, str(error))
    except Exception as error:
        yield Line(topic, "not measured", False, f"{type(error).__name__}: {brief(error)}")


def pictures(images: Source | None, channels: int, place: Path) -> Source:
    """Return the images to check with, of one class.

    Args:
        images: those of the user; by default three landscapes, or embedded clothes if grey.
        channels: of the backbone.
        place: folder to write the clothes to.
    """
    if images is None and channels == 1:
        images = Folder(write_fashion(place / "clothes", "shots", [0, 1, 2]))
    chosen = Selection(images or Folder(Path(str(files("augment.sources"))) / "pictures"))
    name, ids = next(iter(chosen.ids.items()))
    chosen.ids = {name: ids[:IMAGES]}
    return chosen


def machine(device: torch.device) -> Line:
    """Say what runs where."""
    versions = {"latent-augment": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    known = {"versions": versions, "device": str(device), "machine": where}
    return Line("machine", f"{device} ({where}); {text}", values=known)


def _as_json(value: Any) -> Any:
    """Replace numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_as_json, value))
    return None if isinstance(value, float) and not isfinite(value) else value
