r"""A bank on disk: per class, the latents of its labelled images, and how they are made.

A bank is a folder::

    manifest.json                 what it is to hold, and how that is made: the plan
    0000/chunk-0000.safetensors   some latents of a class: ``latents`` (n, C, H, W) float16, and in
                                  float32 their ``norms`` (n,) and ``errors`` (n,), the mean
                                  squared difference of each image, in [0, 1], to its latent
                                  sampled back
    0000/chunk-0000.clean.safetensors   if asked for: ``clean`` (n, C, H, W) float16, z₀
    0000/chunk-0000.nulls.safetensors   what null-text inversion adds: ``nulls`` (g, steps, …)
                                  float16 and ``null_rows`` (n,), which of them is an image's
    0000/chunk-0000.json          the chunk's commit record
    rejects.jsonl                 the images that were left out, and why

The manifest (schema 2) holds the latent shape; the **fingerprint**, which must match before
latents may be mixed or sampled: backbone (weights, codec, process, resolution), inversion (method,
solver, steps, guidance), preprocessing; for information the **recipe**, how `load_backbone` makes
the backbone again, the **source** of the images and the versions it was made **with**; and the
classes in label order, each with its folder, prompt and chunks: their number, the ids of their
images, at most `CHUNK`, and the unit of the job that makes them (`augment.fill`).

A commit record holds bytes and SHA-256 of each of the chunk's files; bytes, SHA-256 and shorter
side of each image's file; the images left out, with the reason; and statistics of the latents. It
is written last, and **a chunk counts if and only if its record is there**; the manifest changes
only where images were added or mended, or went before they were inverted. So any number of workers
may fill a bank, be killed and go on, and `LatentBank.open` refuses one that is not complete.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from augment.errors import BankMismatch, UserError
from augment.files import fits, read_json
from augment.inversion import INVERTERS

SCHEMA = 2
CHUNK = 256
PLANNED = {"number": int, "unit": int, "ids": [str]}
MANIFEST = {
    "schema": int,
    "latent_shape": [int],
    "fingerprint": {
        "backbone": dict,
        "inversion": {"method": str, "steps": int, "guidance": (int, float)},
        "preprocessing": str,
    },
    "recipe": dict,
    "source": str,
    "keeps": [str],
    "made_with": dict,
    "classes": [{"name": str, "folder": str, "prompt": str, "chunks": [PLANNED]}],
}
DIGITS = 16
"""Of a SHA-256 in hexadecimal, where images are only told apart."""

IMAGE = {"id": str, "bytes": int, "sha256": str, "side": int}
RECORD = {
    "files": dict,
    "images": [IMAGE],
    "rejects": [{"id": str, "bytes": int, "sha256": str, "reason": str}],
    "statistics": {"norm?": float, "channel_means?": [float], "error?": float},
}
KINDS = ("latents", "clean", "nulls")


def file_of(stem: Path, kind: str) -> Path:
    """The path of a chunk's file of a kind."""
    part = "" if kind == "latents" else f".{kind}"
    return stem.with_name(f"{stem.name}{part}.safetensors")


def check_file(path: Path, known: dict[str, Any]) -> None:
    """Compare a file with its record.

    Raises:
        OSError: it is missing, or of another size or digest.
    """
    size = path.stat().st_size
    if size != known["bytes"]:
        raise OSError(f"{size} bytes instead of {known['bytes']}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
            raise OSError("other bytes")


def require_same_making(path: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    """Raise `BankMismatch` for the first thing that two manifests say otherwise of latents."""
    for part in ("backbone", "inversion"):
        require_same(path, have["fingerprint"][part], want["fingerprint"][part])
    require_same(path, *({"kept": manifest["keeps"]} for manifest in (have, want)))
    prints = (manifest["fingerprint"] for manifest in (have, want))
    require_same(path, *({"preprocessing": fields["preprocessing"]} for fields in prints))


def require_same(path: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    """Raise `BankMismatch` for the first field in which two fingerprints differ."""
    for key in {**want, **have}:
        if have.get(key) != want.get(key):
            raise BankMismatch(
                f"expected bank {path} to be made with {key} = {want.get(key)}, got "
                f"{have.get(key)}; use that one, or rebuild the bank with latent-augment invert"
            )


def stems(root: Path, record: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Path without suffix, and plan, of each chunk of a class."""
    for plan in record["chunks"]:
        yield root / f"{record['folder']}/chunk-{plan['number']:04d}", plan


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest of this schema.

    Raises:
        UserError: there is none, or it is of another schema or damaged.
    """
    manifest = read_json(path / "manifest.json", "a bank")
    if isinstance(manifest, dict) and manifest.get("schema") not in (SCHEMA, None):
        raise UserError(
            f"expected a bank of schema {SCHEMA} at {path}, got schema {manifest['schema']} of "
            "another version of latent-augment; invert again, into a new folder"
        )
    if not fits(manifest, MANIFEST) or not sound(manifest):
        raise UserError(f"expected a manifest of a bank at {path}, got another; invert again")
    return manifest


def sound(manifest: dict[str, Any]) -> bool:
    """Whether what a manifest names can be: shapes of three, classes and folders once each."""
    classes = manifest["classes"]
    names, folders = ({record[key] for record in classes} for key in ("name", "folder"))
    return (
        len(manifest["latent_shape"]) == 3
        and len(names) == len(folders) == len(classes) > 0
        and all(folder.isascii() and folder.isdigit() for folder in folders)
        and all(fits(value, str) for value in manifest["fingerprint"]["backbone"].values())
        and "name" in manifest["fingerprint"]["backbone"]
        and all(len({c["number"] for c in r["chunks"]}) == len(r["chunks"]) for r in classes)
        and all(chunk["ids"] for record in classes for chunk in record["chunks"])
        and manifest["fingerprint"]["inversion"]["method"] in INVERTERS
        and fits(manifest["recipe"], {"name_or_path": str} if manifest["recipe"] else {})
        and not {"device", "dtype"} & manifest["recipe"].keys()
    )


def read_record(stem: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The commit record of a chunk; None if it is not committed.

    Args:
        stem: of the chunk.
        plan: of it, in the manifest.

    Raises:
        UserError: it is damaged, or of another chunk.
    """
    record = record_at(stem)
    if record is not None and not made_of(record, plan):
        raise damaged(stem)
    return record


def record_at(stem: Path) -> dict[str, Any] | None:
    """The commit record of some chunk; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = stem.with_suffix(".json")
    if not path.exists():
        return None
    record = read_json(path, "a commit record")
    known = {"bytes": int, "sha256": str, "holds": [str]}
    if (
        not fits(record, RECORD)
        or not record["files"].keys() <= set(KINDS)
        or not fits(list(record["files"].values()), [known])
        or bool(record["images"]) != ("latents" in record["files"])
        or bool(record["images"]) != bool(record["statistics"].get("channel_means"))
    ):
        raise damaged(stem)
    return record


def made_of(record: dict[str, Any], plan: dict[str, Any]) -> bool:
    """Whether a record is of the images that were planned, less those that were left out."""
    rejects = {reject["id"] for reject in record["rejects"]}
    return [i for i in plan["ids"] if i not in rejects] == [i["id"] for i in record["images"]]


def damaged(stem: Path) -> UserError:
    """What to say of a record that is none."""
    return UserError(
        f"expected the commit record of a chunk at {stem.with_suffix('.json')}, got another; "
        "remove it, and the same latent-augment invert command makes the chunk again"
    )
