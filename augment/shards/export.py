"""Shards for other tools: a webdataset pipeline, and a folder of images by class.

webdataset, timm and Hugging Face's datasets also read the tars as they are.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm import tqdm

from augment.core.errors import AugmentWarning, UserError, first_few
from augment.core.files import locked, replacing, write_bytes, write_json
from augment.shards.dataset import Shards, open_shards
from augment.shards.format import AGAIN, sources_of
from augment.sources.folder import ORIGINS

METADATA, BEGUN = "metadata.jsonl", ".metadata.jsonl"


def to_webdataset(
    folder: str | Path,
    shuffle: int = 0,
    transform: Callable[[Tensor], Any] | None = None,
    target_transform: Callable[[int], Any] | None = None,
) -> IterableDataset[tuple[Any, Any]]:
    """Stream the images as a webdataset pipeline, every tar from front to back.

    Shards are dealt to nodes, then to the workers of each; a worker without any gives nothing.
    The tars are read by their records, not by webdataset, which cannot open a path with ``#`` or
    ``?``, whose decoders unpickle, and which may lose samples of a truncated tar in silence.

    Args:
        folder: see `open_shards`.
        shuffle: how many samples to shuffle at a time, in another order each time, and a worker's
            shards beside; 0 keeps the order.
        transform: applied to the image.
        target_transform: applied to the label.

    Raises:
        UserError: see `open_shards`.
    """
    from webdataset import filters, pipeline, shardlists

    shards = open_shards(folder, transform, target_transform)
    stream: Any = pipeline.DataPipeline(
        partial(iter, range(len(shards.paths))),
        shardlists.split_by_node,
        shardlists.split_by_worker,
        filters.shuffle(len(shards.paths)) if shuffle else None,
        shards.stream,
        filters.shuffle(shuffle) if shuffle else None,
        filters.map(shards.item),
    )
    return stream


def export_folder(folder: str | Path, out: str | Path) -> None:
    """Write the images of a folder of shards as files ``out/class/key.jpg`` and ``metadata.jsonl``.

    A line of that is an image: ``file_name``, ``label``, ``class_name``, and its plan. It has a
    hidden name until all images are there; the same call again resumes. torchvision's
    ``ImageFolder`` reads this, and numbers the classes by the alphabet; ``load_dataset(
    "imagefolder", data_dir=out)`` too, and takes a class named like a split (test, dev) for one,
    unless it is given ``data_files={"train": "**"}``. A class without an image has an empty folder,
    so that the numbers of the others stay; ``ImageFolder`` reads that with ``allow_empty=True``.

    Raises:
        UserError: the shards do not open or hold no image, a class name can be no folder, two
            images have one key, or there is something else at ``out``.
    """
    shards, out = open_shards(folder), Path(out)
    check_names(shards.classes)
    counts = np.bincount(shards.rows[:, 1], minlength=len(shards.classes))
    if not counts.any():
        raise UserError(f"expected images to export in {folder}, got none; synthesize some")
    if len(np.unique(shards.rows[:, 0])) < len(shards):
        raise UserError(f"expected keys that differ in {folder}, got some twice; {AGAIN}")
    if out.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"expected a place beside {folder}, got {out} in it; choose another")
    with locked(out) as lock:
        claim(out, shards)
        lock.sweep()
        for name in shards.classes:
            (out / name).mkdir(exist_ok=True)
        for index in tqdm(range(len(shards)), "export", unit="image", delay=2, leave=False):
            path, content = out / shards.metadata(index)["file_name"], shards.read(index)
            if not path.is_file() or path.read_bytes() != content:
                write_bytes(path, content, sync=False)
        write_json(out / ORIGINS, sources_of(folder))
        if (out / BEGUN).exists():
            (out / BEGUN).replace(out / METADATA)
    empty = [repr(shards.classes[label]) for label in np.flatnonzero(counts == 0)]
    if empty:
        warnings.warn(
            f"expected images of every class in {folder}, got none of {first_few(empty)}, "
            "whose folders are empty; give torchvision's ImageFolder allow_empty=True, so that it "
            "numbers the classes as they are here",
            AugmentWarning,
            stacklevel=2,
        )


def check_names(classes: Iterable[str]) -> None:
    """Refuse the names of classes that can be no folder."""
    for name in classes:
        good = re.fullmatch(r"(?!\.)[^/\0\ud800-\udfff]+", name)
        if not good or len(name.encode()) > 255 or name == METADATA:
            raise UserError(
                f"expected class names that a folder can have, got {name!r}; read the shards by "
                "open_shards instead"
            )


def claim(out: Path, shards: Shards) -> None:
    """Begin an export to a folder, or find the same one there, begun or finished."""
    lines = (json.dumps(shards.metadata(i)).encode() + b"\n" for i in range(len(shards)))
    known = [out / name for name in (METADATA, BEGUN) if (out / name).exists()]
    if known:
        with known[0].open("rb") as file:
            same = all(one == other for one, other in zip_longest(file, lines))
    else:
        same = all(path.name.startswith(f".{BEGUN}.") for path in out.iterdir())
    if not same:
        raise UserError(
            f"expected an empty folder at {out}, or an export of the same shards, got something "
            "else; choose another place"
        )
    if not known:
        with replacing(out / BEGUN) as file:
            file.writelines(lines)
