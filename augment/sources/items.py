"""Labelled images from any data set of (image, label): torchvision's, Hugging Face's or a list."""

import io
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from augment.core.errors import ImageRejected, UserError
from augment.core.progress import Progress
from augment.sources.decoding import as_shown
from augment.sources.folder import Folder
from augment.sources.listing import MAX_LABELS, warn_of_gaps
from augment.sources.prompts import nfc
from augment.sources.source import Source

_TARGETS = ("targets", "labels", "_labels", "y")
"""Attributes of torchvision's data sets with the labels of all items."""

_NAMES = ("wnids", "classes", "categories")
"""Attributes with the names of the classes; ImageNet's ``classes`` has duplicates."""


class Items(Source):
    """The items (image, integer label) of a map-style data set.

    An image is a PIL image, a uint8 or [0, 1] float tensor (C, H, W) or such a numpy array
    (H, W, C) or (H, W), with 1 or 3 channels; of a Hugging Face data set the Image and the
    ClassLabel column are taken. Labels are read off the data set where it lists them, and else in
    one pass over all items. Image ids are ``class/number``, and their bytes those of a PNG file.
    Items are read again when a bank is resumed, so the data set's own transform must not be
    random; give random ones to ``transform`` here.

    Args:
        dataset: the data set.
        transform, target_transform: applied to the PIL image and to the label of an item.

    Raises:
        UserError: the data set is of another kind, empty, or has labels other than 0, 1, … or
            more of them than names; a Hugging Face one has not just one column of each type.
    """

    threads = False  # an arbitrary data set may not be thread-safe

    def __init__(
        self,
        dataset: Dataset[Any] | Any,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        indexable = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if isinstance(dataset, Mapping) or not indexable:
            hint = f"one of its splits {list(dataset)}" if isinstance(dataset, Mapping) else "such"
            raise UserError(
                f"expected a data set with a length and items (image, label), got "
                f"{type(dataset).__name__}; take {hint}"
            )
        self.root = Path(str(getattr(dataset, "root", type(dataset).__name__)))
        self.dataset = _Columns(dataset) if hasattr(dataset, "features") else dataset
        self.transform, self.target_transform = transform, target_transform
        labels = _labels_of(self.dataset)
        if not labels or not 0 <= min(labels) <= max(labels) < max(MAX_LABELS, len(labels)):
            raise UserError(
                f"expected items with labels 0 … C−1 in {type(dataset).__name__}, got "
                f"{sorted(set(labels))[:3]} …; take out items without a label, number classes "
                "without gaps"
            )
        names = _names_of(self.dataset)
        if not names:
            names = [str(label) for label in range(max(labels) + 1)]
            warn_of_gaps(labels, type(dataset).__name__)
        if len(names) <= max(labels):
            raise UserError(
                f"expected labels below {len(names)}, the number of class names of "
                f"{type(dataset).__name__}, got {max(labels)}; correct its names"
            )
        self.ids = {name: [] for name in names}
        for index, label in enumerate(labels):
            folder = re.sub(r"[^\w .,()'&+-]|^\.", "_", names[label])
            self.ids[names[label]].append(f"{folder}/{index:06d}")
        self._last: tuple[object, bytes] = (None, b"")
        with suppress(OSError):  # an unreadable file is reported when it is needed
            self._picture(self.samples[0][0])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {i: int(i.rpartition("/")[2]) for members in self.ids.values() for i in members}

    def _picture(self, image_id: str) -> Image.Image:
        if image_id not in self._places:
            raise FileNotFoundError(f"no item {image_id}")
        try:
            item = self.dataset[self._places[image_id]]
        except Exception as error:  # of any type, since files may be hostile
            raise OSError(f"{type(error).__name__}: {error}") from error
        return _to_image(_pair(item)[0], self.background, image_id)

    def read(self, image_id: str) -> bytes:
        """Return the image as a PNG file.

        Raises:
            OSError: there is none, or it cannot be read.
            UserError: the item is no (image, label).
        """
        asked = image_id, self.background
        last, content = self._last
        if last != asked:
            buffer = io.BytesIO()
            self._picture(image_id).save(buffer, "PNG")
            content = buffer.getvalue()
            self._last = (asked, content)  # size and digest are asked for in a row
        return content

    def size(self, image_id: str) -> int:
        """Return the number of bytes of the PNG file; 0 if the item cannot be read."""
        try:
            return len(self.read(image_id))
        except OSError:
            return 0

    def open(self, image_id: str, quick: bool = False) -> Image.Image:
        """Open an image as a viewer shows it; see `Source.open`."""
        try:
            return self._picture(image_id)
        except OSError as error:
            raise ImageRejected(
                f"expected a readable image, got item {image_id} ({error}); repair or remove it"
            ) from error


class _Columns(Dataset[tuple[Any, Any]]):
    """The Image and the ClassLabel column of a Hugging Face data set, in its default format."""

    def __init__(self, dataset: Any) -> None:
        types = {name: type(feature).__name__ for name, feature in dataset.features.items()}
        chosen: list[str] = []
        for kind in ("Image", "ClassLabel"):
            columns = [name for name in types if types[name] == kind]
            if len(columns) != 1:
                raise UserError(
                    f"expected one {kind} column, got {', '.join(columns) or 'none'} of "
                    f"{', '.join(types)}; use remove_columns, cast_column or class_encode_column"
                )
            chosen += columns
        self.image, self.label = chosen
        self.dataset = dataset.with_format(None)
        self.classes = list(dataset.features[self.label].names)
        self.targets = list(self.dataset[self.label])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.dataset[index][self.image], self.targets[index]


def as_source(images: object) -> Source:
    """Return a source as it is, an image folder of a path, or the `Items` of any other data set.

    Raises:
        UserError: see `Folder` and `Items`.
    """
    if isinstance(images, Source):
        return images
    return Folder(images) if isinstance(images, str | Path) else Items(images)


def place_of(images: object) -> Source | Path | None:
    """Do what `as_source` does, but leave a folder unlisted: a bank names the images in it."""
    if images is None:
        return None
    return Path(images) if isinstance(images, str | Path) else as_source(images)


def _pair(item: object) -> tuple[Any, Any]:
    """Return the image and the label of an item."""
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise UserError(
            f"expected items (image, label), got {type(item).__name__}; wrap the data set in one "
            "that has such"
        )
    return item[0], item[1]


def _labels_of(dataset: Any) -> list[int]:
    """Return the label of every item, without decoding images if possible."""
    if isinstance(dataset, Subset):
        labels = _labels_of(dataset.dataset)
        return [labels[int(index)] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [label for part in dataset.datasets for label in _labels_of(part)]
    change = getattr(dataset, "target_transform", None) or (lambda label: label)
    for name in _TARGETS:
        targets = getattr(dataset, name, None)
        if isinstance(targets, np.ndarray | torch.Tensor):
            targets = targets.tolist()
        if isinstance(targets, Sequence) and len(targets) == len(dataset):
            with suppress(TypeError):
                return [operator.index(change(label)) for label in targets]
    steps = Progress(range(len(dataset)), "labels", delay=2, leave=False)
    labels = [_pair(dataset[index])[1] for index in steps]
    try:
        return [operator.index(label) for label in labels]
    except TypeError as error:
        raise UserError(
            f"expected integer labels of {type(dataset).__name__}, got others ({error}); give it a "
            "target_transform that makes them integers"
        ) from None


def _names_of(dataset: Any) -> list[str]:
    """Return the distinct class names of a data set in label order; empty if it has none."""
    while isinstance(dataset, Subset | ConcatDataset):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    given = next((names for at in _NAMES if (names := getattr(dataset, at, None))), [])
    names = [nfc(", ".join(n) if isinstance(n, tuple | list) else str(n)) for n in given]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} {k}" for k, name in enumerate(names)]


def _to_image(value: object, background: str = "white", name: str = "") -> Image.Image:
    """Convert an image of any of the kinds that `Items` takes to a PIL image, grey (L) or RGB.

    >>> _to_image(torch.ones(1, 4, 5)).size
    (5, 4)
    """
    if isinstance(value, Image.Image):
        try:
            return as_shown(value, background, name)
        except ValueError as error:
            raise UserError(
                f"expected images of 8 or 16 bits, got one of {error}; convert them in the data "
                "set's transform"
            ) from None
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
        value = value.transpose(1, 2, 0) if value.ndim == 3 else value
    pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype.kind == "f" and pixels.size and -1e-3 < pixels.min() <= pixels.max() < 1.001:
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    grey_or_rgb = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)
    if pixels.dtype != np.uint8 or not grey_or_rgb or not pixels.size:
        raise UserError(
            "expected PIL images, or tensors (C, H, W) or arrays (H, W, C) of 1 or 3 channels, "
            f"uint8 or float in [0, 1], got {type(value).__name__} of {pixels.dtype} "
            f"{pixels.shape}; change the data set's transform"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))
