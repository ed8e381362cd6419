"""Which images a training is of, by their content: names, places and settings may deceive.

The digest of a file is computed once and kept in the run's folder, until the size, the times or
the inode of the file change.
"""

import json
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from augment.bank.bank import LatentBank
from augment.bank.format import DIGITS
from augment.core.errors import AugmentWarning, ImageRejected, UserError
from augment.core.files import read_json, sha256, write_json
from augment.core.progress import Progress
from augment.diffusion.checkpoints.adapter import adapted_to
from augment.replay.pool import ReplayPool
from augment.shards.dataset import Shards
from augment.shards.format import read_settings
from augment.sources import Folder, Source
from augment.sources.folder import ORIGINS
from augment.synthesis.dataset import SyntheticDataset

IMAGES = "images.json"
"""The file of a run that says which images it is of."""

_READERS = 8  # threads that read files
_SAMPLES = 8  # images whose size and colour are looked at

Origins = dict[str, tuple[str | None, str]]
"""Class, if it is known, and id of a bank's image, by the first `DIGITS` digits of its SHA-256."""

FileDigests = dict[str, list[Any]]
"""Digest and stamp of files by path: ``[digest, size, mtime, ctime, inode]``."""


@runtime_checkable
class Images(Protocol):
    """A map-style dataset of (image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


def digests_of(source: Source, files: FileDigests) -> dict[str, str]:
    """Return the first `DIGITS` digits of the SHA-256 of each image by its id; "" if unreadable.

    Args:
        source: the images.
        files: what was computed before; new digests are added.
    """

    def digest(image_id: str) -> str:
        try:
            return source.digest(image_id)[:DIGITS]
        except (OSError, ImageRejected):
            return ""

    paths = {image_id: os.path.join(source.root, image_id) for image_id, _ in source.samples}  # noqa: PTH118
    stamps = {image_id: _stamp(path) for image_id, path in paths.items()}
    new = [i for i, path in paths.items() if not stamps[i] or files.get(path, [])[1:] != stamps[i]]
    with ThreadPoolExecutor(_READERS if source.threads else 1) as pool:
        bar = Progress(pool.map(digest, new), "digests", len(new), delay=2)
        computed = dict(zip(new, bar, strict=True))
    files |= {paths[i]: [computed[i], *stamps[i]] for i in new if stamps[i]}
    return {i: computed[i] if i in computed else files[path][0] for i, path in paths.items()}


def _stamp(path: str) -> list[int]:
    """Return what changes with a file's content, empty if there is no file."""
    try:
        facts = os.stat(path)  # noqa: PTH116, half the time of Path.stat
    except OSError:
        return []
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def content_digest(source: Source, digests: Mapping[str, str]) -> str:
    """Return the SHA-256 of the content and the class of all images of a source, in order."""
    classes = source.classes
    rows = [[classes[label], digests[image_id]] for image_id, label in source.samples]
    return sha256(json.dumps(rows).encode())


def synthetic_digest(synthetic: Images, files: FileDigests) -> str:
    """Return the SHA-256 of synthetic images, or of what they are made from."""
    if isinstance(synthetic, ReplayPool):
        return synthetic_digest(synthetic.dataset, files)
    if isinstance(synthetic, SyntheticDataset):
        return synthetic.synthesizer.bank.digest
    if isinstance(synthetic, Shards):  # a record has the digest of its tar
        records = (path.with_suffix(".json").read_bytes() for path in synthetic.paths)
        return sha256("".join(map(sha256, records)).encode())
    if isinstance(synthetic, Source):
        return content_digest(synthetic, digests_of(synthetic, files))
    return f"{type(synthetic).__name__} of {len(synthetic)}"


class RunImages:
    """What a run's folder keeps of its images: the identity of each part, and digests of files.

    Args:
        path: the file `IMAGES`, made by `write`; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        record = read_json(path, "the images of a run") if path and path.exists() else None
        known = record if isinstance(record, dict) else {}
        self.path, self.parts = path, known.get("parts", {})
        self.files: FileDigests = known.get("files", {})

    def check(self, parts: Mapping[str, str]) -> None:
        """Refuse other images than a run began with."""
        for part, new in parts.items():
            old = self.parts.get(part, new)
            if self.path and old != new:
                raise UserError(
                    f"expected the {part} images that the run in {self.path.parent} began with "
                    f"(SHA-256 {old[:8]}…), got others ({new[:8]}…); bring those back, or choose "
                    "another folder for the run"
                )

    def write(self, parts: Mapping[str, str]) -> None:
        """Keep the identity of each part, and the digests."""
        if self.path:
            write_json(self.path, {"parts": parts, "files": self.files})


def check_run(root: Path, begun: bool, **sources: Source) -> dict[str, dict[str, str]]:
    """Refuse other images than a run began with; return the digests of each source's by id.

    Args:
        root: the folder of the run, where digests are kept.
        begun: whether the run has done anything yet.
        sources: all images of the run by what they are for, such as training.

    Raises:
        UserError: the images differ.
    """
    run = RunImages(root / IMAGES)
    digests = {name: digests_of(source, run.files) for name, source in sources.items()}
    parts = {name: content_digest(source, digests[name]) for name, source in sources.items()}
    if begun:
        run.check(parts)
    run.write(parts)
    return digests


def warn_of_overlap(training: dict[str, str], held_out: Mapping[str, str], name: str) -> None:
    """Warn of held-out images that are trained on."""
    trained = {digest: image_id for image_id, digest in reversed(training.items()) if digest}
    both = [image_id for image_id, digest in held_out.items() if digest in trained]
    if both:
        _warn(
            f"expected {name} images that are not trained on, got {len(both)} of {len(held_out)} "
            f"that are, such as {both[0]}, which is {trained[held_out[both[0]]]} among the "
            "training images; leave them out of one of them"
        )


def origins(synthetic: Images | None) -> Origins:
    """Return the images that synthetic ones come from."""
    if isinstance(synthetic, ReplayPool):
        return origins(synthetic.dataset)
    if isinstance(synthetic, SyntheticDataset):
        return _bank_origins(synthetic.synthesizer.bank)
    if isinstance(synthetic, Shards) and synthetic.paths:
        settings = read_settings(synthetic.paths[0].parent)
        named = {
            digest: (name, image_id)
            for name, images in settings.images.items()
            if isinstance(images, dict)  # older versions' were lists
            for image_id, digest in images.items()
        }
        return {digest: named.get(digest, (None, i)) for digest, i in settings.origins.items()}
    if isinstance(synthetic, Folder) and (synthetic.root / ORIGINS).exists():
        record = read_json(synthetic.root / ORIGINS, "where exported images come from")
        return {d: (None, i) for d, i in record.items()} if isinstance(record, dict) else {}
    return {}


def _bank_origins(bank: LatentBank) -> Origins:
    adapted = adapted_to(bank.fingerprint["backbone"])
    own = {d[:DIGITS]: (name, i) for name in bank.classes for i, d in bank.digests(name).items()}
    made_from: Origins = {digest: (None, what) for digest, what in adapted.items()}
    return made_from | own


def warn_of_strangers(made_from: Origins, real: Source, digests: Mapping[str, str]) -> None:
    """Warn if synthetic images come from others than those that are trained on, by content.

    A classifier of few shots would then know more than its shots. Warn also if a bank has a
    training image in another class.
    """
    classes: dict[str, set[str]] = {}
    for image_id, label in real.samples:
        classes.setdefault(digests[image_id], set()).add(real.classes[label])
    others = [image_id for digest, (_, image_id) in made_from.items() if digest not in classes]
    if others:
        _warn(
            "expected synthetic images of the training images alone, got "
            f"{len(others)} of {len(made_from)} images that they come from, such as {others[0]}, "
            "which are not among these by their content; invert the training images only"
        )
    for digest, (name, image_id) in made_from.items():
        if name and digest in classes and name not in classes[digest]:
            _warn(
                f"expected synthetic images of the same classes, got some made from {image_id} as "
                f"{name}, which is trained on as {min(classes[digest])}; invert it again"
            )
            return


def check_apart(made_from: Origins, held_out: Mapping[str, str], name: str) -> None:
    """Refuse images to validate or test on that synthetic images come from.

    Files are compared, byte by byte: an image that was encoded anew is another.
    """
    for image_id, digest in held_out.items():
        if digest in made_from:
            raise UserError(
                f"expected no {name} image in the bank that synthetic images come from, got "
                f"{image_id}, which is {made_from[digest][1]} there; leave it out of one of them"
            )


def check_new(synthetic: Mapping[str, str], real: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse synthetic images that are real ones to validate or test on; warn of trained ones."""
    own = {digest: image_id for image_id, digest in synthetic.items() if digest}
    for name, digests in real.items():
        same = [own[digest] for digest in digests.values() if digest in own]
        if same and name != "training":
            raise UserError(
                f"expected synthetic images, got {len(same)} of the {name} images, such as "
                f"{same[0]}; take them out"
            )
        if same:
            _warn(
                f"expected synthetic images, got {len(same)} of the training images, such as "
                f"{same[0]}; take them out"
            )


def _look(images: Images) -> tuple[bool, int]:
    """Return whether a few of some images are all grey, and their smallest side in pixels."""
    if isinstance(images, ReplayPool):
        return _look(images.dataset)
    if isinstance(images, SyntheticDataset):
        backbone = images.synthesizer.backbone
        return backbone.channels == 1, backbone.resolution
    shapes = []
    for row in range(0, len(images), -(-len(images) // _SAMPLES)):
        is_file = isinstance(images, Source)
        image = images.open(images.samples[row][0]) if is_file else images[row][0]
        if isinstance(image, Image.Image):
            shapes.append((image.mode == "L", min(image.size)))
        else:
            shapes.append((image.shape[0] == 1, min(image.shape[-2:])))
    return all(grey for grey, _ in shapes), min(side for _, side in shapes)


def warn_of_looks(real: Source, synthetic: Images, channels: int, resolution: int) -> None:
    """Warn of synthetic images that a network can tell from real ones by colour or sharpness."""
    try:
        (grey, side), (fake_grey, fake_side) = _look(real), _look(synthetic)
    except (OSError, ImageRejected):
        return  # it is an error when the image is needed
    if channels == 3 and fake_grey and not grey:
        _warn("expected synthetic images in colour, as the real ones are, got grey ones; "
              "synthesise them with a backbone of colour images")  # fmt: skip
    if fake_side < min(side, resolution):
        _warn(
            f"expected synthetic images of at least {min(side, resolution)} pixels a side, as the "
            f"real ones have, got {fake_side}, which are enlarged and blurred; train at "
            f"--data.resolution {fake_side}, or synthesise larger ones"
        )


def check_numbers(have: np.ndarray, asked: np.ndarray, by_count: bool, names: list[str]) -> None:
    """Warn of classes with fewer synthetic images than the mix asks for."""
    if asked.any() and not have[asked > 0].any():
        raise UserError(
            "expected synthetic images to train with, got none; synthesise some, or leave "
            "--data.synthetic out"
        )
    short = np.flatnonzero(have < asked if by_count else (have == 0) & (asked > 0))
    if len(short):
        first = short[0]
        wanted = int(asked[first]) if by_count else "some"
        _warn(
            f"expected {wanted} synthetic images of class {names[first]}, got {have[first]}; "
            f"{len(short)} of {len(names)} classes are short; synthesise more of them"
        )


def _warn(message: str) -> None:
    warnings.warn(AugmentWarning(message), stacklevel=3)
