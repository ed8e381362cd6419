"""Shards for other tools: a webdataset pipeline, a folder of images by class, and parquet.

webdataset, timm and Hugging Face's datasets also read the tars as they are.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from augment.core.errors import AugmentWarning, UserError, first_few
from augment.core.files import JsonObject, locked, replacing, write_bytes, write_json
from augment.core.progress import Progress
from augment.shards.card import CARD, COLUMNS, card, check_licence, kept, present
from augment.shards.dataset import Shards, open_shards
from augment.shards.format import AGAIN, read_settings
from augment.sources.folder import ORIGINS

METADATA, BEGUN = "metadata.jsonl", ".metadata.jsonl"
GROUP = 100
"""Images of a row group of parquet, which is read at once."""


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


def export_folder(
    folder: str | Path,
    out: str | Path,
    parquet: bool = False,
    model_licence: str | None = None,
    images_licence: str | None = None,
    push: str | None = None,
) -> None:
    """Write the images of a folder of shards for other tools, beside a card of the hub.

    As files: ``out/class/key.jpg`` and ``metadata.jsonl``. A line of that is an image:
    ``file_name``, ``label``, ``class_name``, and its plan. It has a hidden name until all images
    are there. torchvision's ``ImageFolder`` reads this, and numbers the classes by the alphabet. A
    class without an image has an empty folder, so that the numbers of the others stay;
    ``ImageFolder`` reads that with ``allow_empty=True``.

    As parquet: ``out/data/train-00000-of-00012.parquet``, one file a shard.

    ``load_dataset(out)`` reads both, with names of classes, by the card ``README.md``: see
    `augment.shards.card`. The same call again resumes.

    Args:
        folder: of the shards.
        out: folder to write to.
        parquet: write parquet.
        model_licence: licence of the diffusion model; by default that of the shards, if known.
        images_licence: licence of the real images.
        push: name of the hub's dataset that the images will be pushed to, for the card, which
            then needs both licences.

    Raises:
        UserError: the shards do not open or hold no image, a class name can be no folder, two
            images have one key, there is something else at ``out``, or a licence is unknown.
    """
    shards, made, out = open_shards(folder), read_settings(folder), Path(out)
    if not parquet:
        check_names(shards.classes)
    counts = np.bincount(shards.rows[:, 1], minlength=len(shards.classes))
    if not counts.any():
        raise UserError(f"expected images to export in {folder}, got none; synthesize some")
    if len(np.unique(shards.rows[:, 0])) < len(shards):
        raise UserError(f"expected keys that differ in {folder}, got some twice; {AGAIN}")
    if out.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"expected a place beside {folder}, got {out} in it; choose another")
    columns = present(rows(shards, parquet))
    files, model = "data/*.parquet" if parquet else "**", model_licence or made.licence
    place = push or "path/to/this/folder"
    text = kept(out / CARD) or card(shards, made, columns, files, place, model, images_licence)
    if push:  # what can be refused is refused before anything is written
        check_licence(text, model, images_licence)
    with locked(out) as lock:
        claim(out, shards, parquet)
        lock.sweep()
        write_bytes(out / CARD, text.encode())
        if parquet:
            write_parquet(shards, columns, out / "data")
        else:
            write_files(shards, out)
        write_json(out / ORIGINS, made.origins)
        if not parquet and (out / BEGUN).exists():
            (out / BEGUN).replace(out / METADATA)
    empty = [repr(shards.classes[label]) for label in np.flatnonzero(counts == 0)]
    if empty and not parquet:
        warnings.warn(
            f"expected images of every class in {folder}, got none of {first_few(empty)}, "
            "whose folders are empty; give torchvision's ImageFolder allow_empty=True, so that it "
            "numbers the classes as they are here",
            AugmentWarning,
            stacklevel=2,
        )


def rows(shards: Shards, parquet: bool) -> Iterator[JsonObject]:
    """Yield the metadata of each image; in parquet there are no names of files."""
    for index in range(len(shards)):
        facts = shards.metadata(index)
        if parquet:
            del facts["file_name"]
        yield facts


def write_files(shards: Shards, out: Path) -> None:
    """Write each image as a file in the folder of its class; those that are there stay."""
    for name in shards.classes:
        (out / name).mkdir(exist_ok=True)
    for index in Progress(range(len(shards)), "export", unit="image", delay=2, leave=False):
        path, content = out / shards.metadata(index)["file_name"], shards.read(index)
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content, sync=False)


def write_parquet(shards: Shards, columns: Sequence[str], out: Path) -> None:
    """Write each shard as a parquet file of images and metadata; those that are there stay.

    Raises:
        UserError: pyarrow is missing, or a stranger's metadata are of other types.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "expected pyarrow to write parquet, got no such package; pip install pyarrow"
        ) from None
    kinds = {name: COLUMNS[name] for name in columns} | {"label": "int64"}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    for name, kind in kinds.items():
        several = isinstance(kind, list)
        kind = pa.type_for_alias(kind[0] if several else kind)
        fields.append((name, pa.list_(kind) if several else kind))
    typed = {
        "image": {"_type": "Image"},
        "label": {"names": shards.classes, "_type": "ClassLabel"},
    }  # what Hugging Face's datasets reads
    info = json.dumps({"info": {"features": typed}})
    schema = pa.schema(fields, {"huggingface": info})
    total = len(shards.paths)
    for number in Progress(range(total), "export", unit="shard", delay=2, leave=False):
        path = out / f"train-{number:05d}-of-{total:05d}.parquet"
        indices = range(*shards.starts[number : number + 2])
        if path.is_file() and _holds(path, shards, indices):
            continue
        with replacing(path) as file, parquet.ParquetWriter(file, schema) as writer:
            for start in range(indices.start, indices.stop, GROUP):
                part = [_row(shards, i) for i in range(start, min(start + GROUP, indices.stop))]
                try:
                    table = pa.Table.from_pylist(part, schema)
                except (pa.ArrowException, TypeError) as error:
                    raise UserError(
                        f"expected plans as latent-augment writes them in {shards.paths[number]}, "
                        f"got others ({error}); export without parquet"
                    ) from None
                writer.write_table(table)


def _holds(path: Path, shards: Shards, indices: Sequence[int]) -> bool:
    """Return whether a parquet file has these images of the shards; a damaged one has none."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            parts = file.iter_batches(GROUP, columns=["image"])
            found = (row["bytes"] for part in parts for row in part.column(0).to_pylist())
            return file.metadata.num_rows == len(indices) and all(
                content == shards.read(i) for content, i in zip(found, indices, strict=True)
            )
    except (pa.ArrowException, LookupError, TypeError, ValueError):
        return False


def _row(shards: Shards, index: int) -> JsonObject:
    """Return an image and its metadata as a row of parquet."""
    facts = shards.metadata(index)
    name = Path(facts["file_name"]).name
    return {"image": {"bytes": shards.read(index), "path": name}, **facts}


def check_names(classes: Iterable[str]) -> None:
    """Refuse the names of classes that can be no folder."""
    for name in classes:
        good = re.fullmatch(r"(?!\.)[^/\0\ud800-\udfff]+", name)
        if not good or len(name.encode()) > 255 or name in (METADATA, CARD):
            raise UserError(
                f"expected class names that a folder can have, got {name!r}; read the shards by "
                "open_shards instead"
            )


def claim(out: Path, shards: Shards, parquet: bool) -> None:
    """Begin an export to a folder, or find the same one there, begun or finished."""
    lines = (json.dumps(facts).encode() + b"\n" for facts in rows(shards, parquet))
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
