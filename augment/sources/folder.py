"""Labelled images from ``root/class/*.png``, or of another format that Pillow reads."""

import errno
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from augment.core.errors import AugmentWarning, UserError, shown
from augment.sources.images import SUFFIXES, parse_colour
from augment.sources.prompts import nfc
from augment.sources.source import Source

ORIGINS = ".origins.json"
"""File in a folder of exported images: the real ones that they come from."""

_EXPORTED = ("metadata.jsonl", "README.md")  # beside the class folders of exported images
_HIDDEN, _LINK, _FOLDERS = "hidden", "links out of the folder", "links to folders"
_OUTSIDE, _DEEPER = "outside a class folder", "in sub-folders"
_OPTION = "use invert --{0}, or a Folder with {0}: true"


class Folder(Source):
    """An image folder: one sub-folder a class, files and folders in alphabetical order.

    Every file is taken or counted in ``passed``, and a warning says so: files of other formats, in
    sub-folders of a class folder, or outside one, hidden images, and links that lead out of the
    root. Image ids are paths relative to the root; class names are in Unicode's form NFC.

    Args:
        root: the folder.
        links: follow links that lead out of the root.
        transform, target_transform: applied to the PIL image and to the label of an item.
        nested: take the images in all sub-folders of a class folder too.
        background: colour that is seen through transparent pixels.

    Attributes:
        passed: number of files that were passed over, by reason.

    Raises:
        UserError: the root is missing, holds no class folder, or a class folder holds no image,
            unless ``latent-augment export`` left it empty; or two class names are the same but
            for their Unicode form.
    """

    def __init__(
        self,
        root: str | Path,
        links: bool = False,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        nested: bool = False,
        background: str = "white",
    ) -> None:
        self.root, self.transform, self.target_transform = Path(root), transform, target_transform
        self.background, self.nested = parse_colour(background), nested
        self.passed: Counter[str] = Counter()
        if not self.root.is_dir():
            state = "is a file" if self.root.exists() else "is not there"
            raise UserError(
                f"expected a folder of class folders, got {root}, which {state}; check the path"
            )
        self._inside = None if links else self.root.resolve()
        try:
            folders = self._class_folders()
            self.ids = {name: self._images(folder) for name, folder in folders.items()}
        except OSError as error:
            raise UserError(
                f"expected to read {error.filename}, got {error.strerror}; change its permissions"
            ) from None
        exported = (self.root / ORIGINS).exists()
        empty = next((name for name, ids in self.ids.items() if not ids and not exported), None)
        if empty is not None or not self.ids:
            raise UserError(self._nothing(folders.get(empty or "", self.root)))
        if self.passed.total():
            hint = f"; to follow links, {_OPTION.format('links')}" if self.passed[_LINK] else ""
            hint += f"; to read these, {_OPTION.format('nested')}" if self.passed[_DEEPER] else ""
            warnings.warn(
                f"{root}: {len(self)} images taken, {_passed_over(self.passed)}{hint}",
                AugmentWarning,
                stacklevel=2,
            )

    def _class_folders(self) -> dict[str, Path]:
        """List the class folders by name, sorted by it."""
        folders: dict[str, Path] = {}
        for path in filter(self._visible, self.root.iterdir()):
            if not path.is_dir():
                self.passed[_OUTSIDE] += path.name not in _EXPORTED
                continue
            name = nfc(path.name)
            if name in folders:
                raise UserError(
                    f"expected one folder a class in {self.root}, got {shown(folders[name].name)} "
                    f"and {shown(path.name)}, which are the same name; put their images together"
                )
            folders[name] = path
        return dict(sorted(folders.items()))

    def _visible(self, path: Path) -> bool:
        """Return whether a path is neither hidden nor a link out of the root; count it if it is."""
        if path.name[0] == ".":
            self.passed[_HIDDEN] += path.suffix.lower() in SUFFIXES
            return False
        if self._inside is None or not path.is_symlink():
            return True
        try:
            stays = path.resolve().is_relative_to(self._inside)
        except (OSError, RuntimeError):  # a loop
            return True  # it is reported later, as a file that cannot be read
        self.passed[_LINK] += not stays
        return stays

    def _images(self, folder: Path, prefix: str = "") -> list[str]:
        """List the ids of a class folder's images, sorted; count its other files."""
        ids, texts, prefix = [], [], f"{prefix}{folder.name}/"
        for path in filter(self._visible, folder.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                ids.append(prefix + path.name)
            elif path.suffix == ".txt" and not path.is_dir():
                texts.append(path.stem)
            elif not path.is_dir():
                self.passed[path.suffix.lower()[1:] or "without a suffix"] += 1
            elif path.is_symlink():
                self.passed[_FOLDERS] += not path.resolve().is_relative_to(self.root.resolve())
            elif self.nested:
                ids += self._images(path, prefix)
            else:
                self.passed[_DEEPER] += sum(len(files) for _, _, files in os.walk(path))
        if texts:  # those beside an image are its caption
            stems = {os.path.splitext(os.path.basename(i))[0] for i in ids}  # noqa: PTH119, PTH122
            self.passed["txt"] += sum(stem not in stems for stem in texts)
        return sorted(ids)

    def _nothing(self, folder: Path) -> str:
        """Explain a class folder without images, or a root without class folders."""
        passed, deeper = Counter(self.passed), []
        self.passed.clear()
        if folder == self.root:
            advice = "use root/class/*.jpg"
            what = f"class folders in {folder}"
        else:
            self._images(folder)
            passed = self.passed
            deeper = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != "."]
            advice = "add one or remove the folder"
            what = f"images ({' '.join(SUFFIXES)}) in the class folder {folder}"
        if passed[_DEEPER]:
            advice = (
                f"give {folder} in place of {self.root} if {shown(deeper[0].name)} is a class, or, "
                f"if {shown(folder.name)} is one, {_OPTION.format('nested')}"
            )
        elif passed[_LINK]:
            advice = f"copy what they point to or, to follow links, {_OPTION.format('links')}"
        got = _passed_over(passed) if passed.total() else "none"
        return f"expected {what}, got {got}; {advice}"

    def keep_out(self, place: Path) -> None:
        """Refuse to write to a place in the folder; see `Source.keep_out`."""
        if place.resolve().is_relative_to(self.root.resolve()):
            raise UserError(
                f"expected a place beside the images in {self.root}, got {place} in them; choose "
                "another"
            )

    def read(self, image_id: str) -> bytes:
        """Return the bytes of an image's file; raise `OSError` if it cannot be read."""
        path = self.root / image_id
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "Not a regular file", str(path))  # a pipe would never end
        return path.read_bytes()


def _passed_over(reasons: Counter[str]) -> str:
    """Return how many files were passed over, by reason.

    >>> _passed_over(Counter({"heic": 6, "in sub-folders": 4}))
    '10 files passed over: 6 heic, 4 in sub-folders'
    """
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common() if count)
    some = f"{reasons.total()} file{'s' * (reasons.total() > 1)}"
    return f"{some} passed over: {counts}"
