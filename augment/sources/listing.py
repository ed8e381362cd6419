"""Labelled images from a list file, a line ``relative/path label`` for each.

So the splits of ImageNet-LT and Places-LT (Liu et al., arXiv 1904.05160) and of iNaturalist 2018
are published; the list files are those of github.com/facebookresearch/classifier-balancing.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from augment.core.errors import AugmentWarning, UserError, lookup
from augment.sources.prompts import nfc
from augment.sources.source import Source

MAX_LABELS = 100_000
"""Number of classes up to which there may be more of them than images."""


class ListFile(Source):
    """Images of a list file, in its order and with its labels 0 … C−1.

    The class of a label is named by the folder that its images are in, where that is one and no
    other label has images there, and else by the label's number; so is a label without images, of
    which there is a warning. Lists of the same data may thus name a class differently; ``classes``
    makes them agree. Image ids are the paths.

    Args:
        root: folder that the paths start from.
        listing: the file; blank lines are passed over, paths may have blanks.
        classes: names of the labels; may name classes beyond the list's labels.
        transform, target_transform: applied to the PIL image and to the label of an item.

    Raises:
        UserError: the root or the file is missing, a line is of another form, a path leads out of
            the root or is there twice, names are too few or not distinct, or the first image is
            not in the root. The others are only looked for when they are read.
    """

    def __init__(
        self,
        root: str | Path,
        listing: str | Path,
        classes: list[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.root, self.transform, self.target_transform = Path(root), transform, target_transform
        if not self.root.is_dir():
            raise UserError(
                f"expected the folder that the paths of {listing} start from, got {root}, which is "
                "no folder; correct the root"
            )
        labels = _read_list(Path(listing))
        names = _folder_names(labels) if classes is None else [nfc(name) for name in classes]
        self.ids = {name: [] for name in names}
        if len(self.ids) < len(names) or len(names) <= max(labels.values()):
            raise UserError(
                f"expected {max(labels.values()) + 1} or more distinct names for the classes of "
                f"{listing}, got {len(names)}, {len(self.ids)} of them distinct; name every label"
            )
        members = list(self.ids.values())
        for path, label in labels.items():
            members[label].append(path)
        if classes is None:
            warn_of_gaps(labels.values(), listing)
        first = next(iter(labels))
        if not os.path.exists(self.root / first):  # noqa: PTH110, false for a name too long
            raise UserError(
                f"expected the images of {listing} in {root}, got no {first} there; correct the "
                "root, or copy them to it"
            )


def _read_list(listing: Path) -> dict[str, int]:
    """Read the labels of a list file's images by path, in its order; see `ListFile`."""
    try:  # names that are not UTF-8 are as Python has them
        lines = listing.read_text("utf-8-sig", "surrogateescape").split("\n")
    except OSError as error:
        raise UserError(
            f"expected a list of images, got {listing}, which cannot be read ({error.strerror}); "
            "correct its path"
        ) from None
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"line {number} of {listing}"
        path, _, label = line.strip().replace("\t", " ").rpartition(" ")
        parts = [part for part in path.split("/") if part not in ("", ".", " ")]
        if not re.fullmatch(r"[0-9]{1,9}", label) or not parts:
            raise UserError(
                f"expected a path, a blank and a label 0, 1, … in {place}, got "
                f"{line.strip()[:80]!r}; correct it"
            )
        if path[0] == "/" or ".." in parts or "\0" in path:
            raise UserError(
                f"expected a path below the root in {place}, got {path[:80]!r}; make it relative"
            )
        path = "/".join(parts).strip()
        if path in labels:
            raise UserError(
                f"expected every image once, got {path} again in {place}; remove one of the lines"
            )
        labels[path] = int(label)
    if not labels:
        raise UserError(f"expected lines 'path label' in {listing}, got none; is it complete?")
    largest = max(labels, key=lambda path: labels[path])
    if labels[largest] >= max(MAX_LABELS, len(labels)):
        raise UserError(
            f"expected labels 0 … C−1 in {listing}, got {labels[largest]} of {largest}; number the "
            "classes without gaps"
        )
    return labels


def warn_of_gaps(labels: Iterable[int], listing: str | Path) -> None:
    """Warn of labels below the largest that no image has."""
    used = set(labels)
    gaps = sorted(set(range(max(used))) - used)
    if gaps:
        first = ", ".join(map(str, gaps[:6])) + (" …" if len(gaps) > 6 else "")
        warnings.warn(
            f"expected labels 0 … C−1 in {listing}, got {len(gaps)} labels below {max(used)} "
            f"without an image ({first}), which become classes; number the classes without gaps, "
            "or name them all",
            AugmentWarning,
            stacklevel=3,
        )


def _folder_names(labels: dict[str, int]) -> list[str]:
    """Name labels by their images' folders; see `ListFile`.

    >>> _folder_names({"a/fish/1.jpg": 0, "a/bird/1.jpg": 2, "b/bird/2.jpg": 2})
    ['fish', '1', 'bird']
    """
    pairs = {(label, nfc(f"/{path}".split("/")[-2])) for path, label in labels.items()}
    folders, labels_of = Counter(label for label, _ in pairs), Counter(name for _, name in pairs)
    names = {
        label: name
        for label, name in pairs
        if folders[label] == labels_of[name] == 1
        and name
        # a folder that is named by another label's number would be mistaken for that
        and (not name.isdecimal() or name == str(label))
    }
    return [names.get(label, str(label)) for label in range(max(labels.values()) + 1)]


class PublishedList(ListFile):
    """A split of a published data set; classes are named as in the train list, if it is there.

    Args:
        root: folder that the paths start from.
        split: such as train.
        lists: folder of the list files; the root by default.
        transform, target_transform: applied to the PIL image and to the label of an item.

    Raises:
        UserError: an unknown split, or see `ListFile`.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        lists: str | Path | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        folder = Path(root if lists is None else lists)
        files = {split: folder / f"{self.name}_{split}.txt" for split in self.splits}
        listing, train = lookup(files, split, "split"), files["train"]
        classes = _folder_names(_read_list(train)) if listing != train and train.exists() else None
        super().__init__(root, listing, classes, transform, target_transform)


class ImageNetLT(PublishedList):
    """ImageNet-LT: 115 846 images of 1000 classes, 1280 … 5 a class; root is ImageNet-1k's folder.

    The lists ``ImageNet_LT_{split}.txt`` have val images out of ``train/`` and test images out of
    ``val/n01440764/``, so the validation images have to be in class folders.
    """

    name = "ImageNet_LT"


class PlacesLT(PublishedList):
    """Places-LT: 62 500 images of 365 classes, 4980 … 5 a class; ``Places_LT_{split}.txt``."""

    name = "Places_LT"


class INaturalist18(PublishedList):
    """iNaturalist 2018: 437 513 images of 8142 classes; ``iNaturalist18_{split}.txt``."""

    name, splits = "iNaturalist18", ("train", "val")
