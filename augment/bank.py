r"""The bank: per class, the latents of its labelled images, on disk.

A bank is a folder::

    manifest.json                 what is in it, and how it was made
    0000/chunk-0000.safetensors   class 0, its first 256 latents: ``latents`` (n, C, H, W) float16
    0000/chunk-0000.nulls.safetensors   what null-text inversion adds: ``nulls`` (g, steps, …)
                                  float16 and ``null_rows`` (n,), which of them is an image's
    0000/chunk-0001.safetensors   … and ``norms`` (n,) float32 beside the latents
    0001/chunk-0000.safetensors   class 1 …

The manifest (schema 1) holds the latent shape; the **fingerprint**, which must match before
latents may be mixed or sampled: backbone, weights, process, inversion, steps, guidance; the
**recipe**, how `load_backbone` makes the backbone again, for information; and the
classes in label order, each with its prompt, the ids it is to hold, and its chunks so far (file,
bytes, SHA-256, and each image's id with the SHA-256 of its file). A chunk counts from the moment
the manifest names it, and the manifest is replaced whole; so an interrupted inversion goes on
from its last chunk, and `LatentBank.open` refuses a bank that is not complete.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from augment.diffusion.backbone import Backbone, check_batch
from augment.errors import BankMismatch, EnlargedWarning, UserError
from augment.files import check_folder, read_json, sha256, write_bytes, write_json
from augment.images import shorter_side
from augment.inversion import check_guidance, inverted, inverter

SCHEMA = 1
CHUNK = 256
ENLARGED = 1.5  # by how much images may be enlarged in silence


@runtime_checkable
class Source(Protocol):
    """Where labelled images come from."""

    ids: dict[str, list[str]]

    def read(self, image_id: str) -> bytes:
        """The bytes of an image's file."""
        ...

    def load(self, image_id: str, channels: int, resolution: int) -> Tensor:
        """The prepared image."""
        ...


@dataclass(frozen=True)
class LatentBank:
    """Inverted latents by class.

    Args:
        path: the folder.
        manifest: its manifest.
        members: the image ids of each class that this view shows, in label order.
    """

    path: Path
    manifest: dict[str, Any]
    members: dict[str, tuple[str, ...]]

    @classmethod
    def open(cls, path: str | Path) -> "LatentBank":
        """A bank on disk.

        Raises:
            UserError: there is none, it is of another schema, or its inversion did not finish.
        """
        path = Path(path)
        manifest = read_manifest(path)
        done = {
            c["name"]: tuple(i["id"] for k in c["chunks"] for i in k["images"])
            for c in manifest["classes"]
        }
        missing = sum(len(c["ids"]) - len(done[c["name"]]) for c in manifest["classes"])
        if missing:
            raise UserError(
                f"expected a complete bank at {path}, got one that lacks {missing} images; "
                "run the same latent-augment invert command again to finish it"
            )
        return cls(path, manifest, done)

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return list(self.members)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How the latents were made; see the module's docstring."""
        return self.manifest["fingerprint"]

    def prompt(self, class_name: str) -> str:
        """The prompt a class was inverted with; empty if none."""
        return self._class(class_name)["prompt"]

    @property
    def inversion(self) -> dict[str, Any]:
        """Method, steps, guidance and settings of the inversion."""
        return self.fingerprint["inversion"]

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of `load_backbone` that made the backbone; by its name if unknown."""
        return self.manifest.get("recipe") or {"name_or_path": self.fingerprint["backbone"]["name"]}

    def latents(self, class_name: str) -> Float[Tensor, "n c h w"]:
        """The latents of a class in float32, in the order of ``members``.

        Raises:
            UserError: no such class, or a chunk is missing or damaged.
        """
        chunks = self._class(class_name)["chunks"]
        rows = torch.cat([self._file(chunk, "latents")["latents"] for chunk in chunks]).float()
        return rows[self._places(class_name)]

    def nulls(self, class_name: str) -> tuple[Float[Tensor, "g steps ..."], Int[Tensor, " n"]]:
        """A class's embeddings by null-text inversion, float16, and which is whose of ``members``.

        Raises:
            UserError: the bank has none, no such class, or a file is missing or damaged.
        """
        chunks = self._class(class_name)["chunks"]
        if any("nulls" not in chunk for chunk in chunks):
            raise UserError(
                f"expected a bank of null_text at {self.path}, got one of "
                f"{self.inversion['method']}; invert with that"
            )
        parts, rows, offset = [], [], 0
        for chunk in chunks:
            found = self._file(chunk["nulls"], "nulls", "null_rows")
            parts.append(found["nulls"])
            rows.append(found["null_rows"] + offset)
            offset += len(found["nulls"])
        return torch.cat(parts), torch.cat(rows)[self._places(class_name)]

    def _places(self, class_name: str) -> list[int]:
        """Where in a class's chunks its members stand."""
        chunks = self._class(class_name)["chunks"]
        ids = [image["id"] for chunk in chunks for image in chunk["images"]]
        row_of = {image_id: row for row, image_id in enumerate(ids)}
        return [row_of[image_id] for image_id in self.members[class_name]]

    def features(self, which: str | Path) -> dict[str, Float[Tensor, "n f"]]:
        """A vector of every image, by class, in the order of ``members``: what nearness goes by.

        Args:
            which: ``latent``, the latents themselves, flattened (all are read into memory); or a
                .safetensors file that has under each image's id its vector, all of one length.

        Raises:
            UserError: no such file, it lacks an image, or a vector is of another length or not
                finite.
        """
        if which == "latent":
            return {name: self.latents(name).flatten(1) for name in self.classes}
        ids = [image_id for members in self.members.values() for image_id in members]
        vectors = read_vectors(Path(which), ids)
        return {name: torch.stack([vectors[i] for i in m]) for name, m in self.members.items()}

    def subset(self, keep: Callable[[str], bool]) -> "LatentBank":
        """A view of the images whose id passes ``keep``; classes and labels stay.

        Raises:
            UserError: a class would be left without an image.
        """
        members = {name: tuple(filter(keep, ids)) for name, ids in self.members.items()}
        for name, ids in members.items():
            if not ids:
                raise UserError(
                    f"expected at least one image of class {name!r}, got none; keep one"
                )
        return replace(self, members=members)

    def check(self, backbone: Backbone) -> None:
        """Refuse a backbone the latents were not made with.

        Raises:
            BankMismatch: the first field that differs is named.
        """
        require_same(self.path, self.fingerprint["backbone"], backbone.fingerprint)

    def _class(self, name: str) -> dict[str, Any]:
        for record in self.manifest["classes"]:
            if record["name"] == name:
                return record
        raise UserError(f"expected a class out of {', '.join(self.classes)}, got {name!r}")

    def _file(self, chunk: dict[str, Any], *keys: str) -> dict[str, Tensor]:
        path = self.path / chunk["file"]
        try:
            content = path.read_bytes()
            if sha256(content) != chunk["sha256"]:
                raise UserError(
                    f"expected {path} as it was written, got other bytes; "
                    "delete the bank and invert again"
                )
            tensors = load(content)
            return {key: tensors[key] for key in keys}
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"expected a readable chunk {path}, got {error!r}; delete the bank and invert again"
            ) from None


def read_vectors(path: Path, ids: list[str]) -> dict[str, Float[Tensor, " f"]]:
    """The vectors of images in a .safetensors file, float32; see `LatentBank.features`."""
    try:
        vectors = {key: vector.float() for key, vector in load(path.read_bytes()).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"expected latent or a readable .safetensors file of features, got {path} ({error}); "
            "check the path"
        ) from None
    missing = [i for i in ids if i not in vectors]
    if missing:
        raise UserError(
            f"expected a vector in {path} for each of {len(ids)} images of the bank, got none for "
            f"{missing[0]}; add it under that name"
        )
    shape = (vectors[ids[0]].numel(),)
    for image_id in ids:
        vector = vectors[image_id]
        if vector.shape != shape or not vector.isfinite().all():
            found = "NaN or infinity" if vector.shape == shape else f"shape {tuple(vector.shape)}"
            raise UserError(
                f"expected finite vectors in {path}, all of shape {shape}, got {found} for "
                f"{image_id}; mend that one"
            )
    return vectors


def require_same(path: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    """Raise `BankMismatch` for the first field in which two fingerprints differ."""
    for key in {**want, **have}:
        if have.get(key) != want.get(key):
            raise BankMismatch(
                f"expected bank {path} to be made with {key} = {want.get(key)}, got "
                f"{have.get(key)}; use that one, or rebuild the bank with latent-augment invert"
            )


def fill_bank(
    path: str | Path,
    backbone: Backbone,
    source: Source,
    prompts: dict[str, str] | None = None,
    inversion: str = "forward_start",
    steps: int = 25,
    guidance: float | None = None,
    batch_size: int = 64,
    **settings: Any,
) -> LatentBank:
    """Invert a source's images into a bank; a partial bank of the same settings is completed.

    Args:
        path: the bank's folder, made if needed.
        backbone: the model to invert with.
        source: labelled images, such as `augment.sources.Folder`.
        prompts: a prompt for each class; none by default.
        inversion: a key of `augment.inversion.INVERTERS`.
        steps: solver steps.
        guidance: scale of classifier-free guidance; see `augment.invert`.
        batch_size: images a network call; halved if a GPU's memory is too small.
        settings: the inversion's others, such as ``iterations`` of ``fixed_point``.

    Raises:
        ImageRejected: an image cannot be read; nothing is written then.
        BankMismatch: the folder holds a bank of other settings.
        UserError: the bank holds other images, a prompt or setting is unknown, or a latent is not
            finite.

    Warns:
        EnlargedWarning: images are much smaller than the backbone's.
    """
    path, prompts = Path(path), prompts or {}
    # what can be refused is refused before anything is read or written
    run = inverter(inversion, steps=steps, **settings)
    check_batch(batch_size)
    check_folder(path)
    unknown = prompts.keys() - source.ids.keys()
    if unknown:
        raise UserError(
            f"expected prompts for classes out of {', '.join(source.ids)}, got one for "
            f"{min(unknown)!r}; choose one of these"
        )
    scale = run.guidance if guidance is None else guidance
    texts = [prompts.get(name, "") for name in source.ids]
    check_guidance(run, backbone, texts, scale)
    backbone.condition(texts)
    digests = read_all(source, backbone)
    manifest = {
        "schema": SCHEMA,
        "latent_shape": list(backbone.latent_shape),
        "fingerprint": {
            "backbone": backbone.fingerprint,
            "inversion": {"method": inversion, "guidance": scale, **dataclasses.asdict(run)},  # type: ignore[call-overload]
        },
        "recipe": backbone.recipe,
        "classes": [
            {"name": name, "prompt": prompts.get(name, ""), "ids": ids, "chunks": []}
            for name, ids in source.ids.items()
        ],
    }
    if (path / "manifest.json").exists():
        manifest = resume(path, manifest, digests)
    write_json(path / "manifest.json", manifest)
    size = 2**26 // (backbone.channels * backbone.resolution**2)  # pixels that memory holds
    jobs = list(todo(manifest, min(CHUNK, 16 if run.away == "nulls" else CHUNK, max(size, 1))))
    with tqdm(total=len(digests), desc="bank", unit="image", delay=2, leave=False) as bar:
        bar.update(len(digests) - sum(len(ids) for _, _, ids in jobs))
        for label, record, ids in jobs:
            images = torch.stack(
                [source.load(i, backbone.channels, backbone.resolution) for i in ids]
            )
            seeds = [int(digests[i][:8], 16) for i in ids]
            kept = inverted(run, backbone, images, record["prompt"], scale, batch_size, seeds)
            stem = f"{label:04d}/chunk-{len(record['chunks']):04d}"
            chunk: dict[str, Any] = store(path, f"{stem}.safetensors", pack(kept["latents"], ids))
            if "nulls" in kept:
                content = pack_nulls(kept["nulls"], kept["null_rows"])
                chunk["nulls"] = store(path, f"{stem}.nulls.safetensors", content)
            chunk["images"] = [{"id": i, "sha256": digests[i]} for i in ids]
            record["chunks"].append(chunk)
            write_json(path / "manifest.json", manifest)
            bar.update(len(ids))
    return LatentBank.open(path)


def store(root: Path, file: str, content: bytes) -> dict[str, Any]:
    """Write a file of the bank; its record in the manifest."""
    write_bytes(root / file, content)
    return {"file": file, "bytes": len(content), "sha256": sha256(content)}


def read_all(source: Source, backbone: Backbone) -> dict[str, str]:
    """Decode every image once, so that a bad one stops the job before it begins; the digests."""
    digests, small = {}, {}
    ids = [i for members in source.ids.values() for i in members]
    for image_id in tqdm(ids, "check images", unit="image", delay=2, leave=False):
        source.load(image_id, backbone.channels, backbone.resolution)
        content = source.read(image_id)
        digests[image_id] = sha256(content)
        side = shorter_side(content)
        if side and side * ENLARGED < backbone.resolution:
            small[image_id] = side
    if small:
        least = min(small, key=lambda image_id: small[image_id])
        warnings.warn(
            f"expected images of about {backbone.resolution} pixels, got {len(small)} of "
            f"{len(ids)} that are enlarged more than {ENLARGED}-fold ({least}: {small[least]}); "
            "their latents are of blurred images",
            EnlargedWarning,
            stacklevel=3,
        )
    return digests


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest of this schema, with everything that is read of one."""
    manifest = read_json(path / "manifest.json", "a bank")
    try:
        if manifest["schema"] != SCHEMA:
            raise KeyError("schema")
        for part in ("backbone", "inversion"):
            dict(manifest["fingerprint"][part])
        for record in manifest["classes"]:
            _ = record["name"], record["prompt"], list(record["ids"])
            for chunk in record["chunks"]:
                _ = (
                    chunk["file"],
                    chunk["sha256"],
                    [(i["id"], i["sha256"]) for i in chunk["images"]],
                )
                _ = [chunk["nulls"][key] for key in ("file", "sha256") if "nulls" in chunk]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"expected a bank of schema {SCHEMA} at {path}, got another; invert again"
        ) from None
    return manifest


def resume(path: Path, manifest: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """The manifest on disk, if it is of the same job."""
    old = read_manifest(path)
    for part in ("backbone", "inversion"):
        require_same(path, old["fingerprint"][part], manifest["fingerprint"][part])
    jobs = [[{**c, "chunks": None} for c in m["classes"]] for m in (old, manifest)]
    done = [image for c in old["classes"] for chunk in c["chunks"] for image in chunk["images"]]
    if jobs[0] != jobs[1] or any(digests[image["id"]] != image["sha256"] for image in done):
        raise UserError(
            f"expected the bank {path} to hold the same images and prompts, got others; "
            "use a new folder"
        )
    return old


def todo(manifest: dict[str, Any], size: int) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
    """(label, class record, image ids) of every chunk, of so many images, that is not yet there."""
    for label, record in enumerate(manifest["classes"]):
        start = sum(len(chunk["images"]) for chunk in record["chunks"])
        for first in range(start, len(record["ids"]), size):
            yield label, record, record["ids"][first : first + size]


def pack_nulls(nulls: Float[Tensor, "g steps ..."], rows: Int[Tensor, " n"]) -> bytes:
    """The bytes of a chunk's embeddings.

    Raises:
        UserError: one is not finite.
    """
    halves = nulls.half().cpu().contiguous()
    if not halves.isfinite().all():
        raise UserError(
            "expected null-text embeddings that float16 can hold, got NaN or infinity; invert with "
            "dtype float32 or less guidance"
        )
    return save({"nulls": halves, "null_rows": rows.cpu()})


def pack(latents: Float[Tensor, "n c h w"], ids: list[str]) -> bytes:
    """A chunk's bytes.

    Raises:
        UserError: a latent is not finite; its image is named.
    """
    norms = latents.flatten(1).norm(dim=1)
    halves = latents.half().cpu().contiguous()
    for latent, image_id in zip(halves, ids, strict=True):
        if not latent.isfinite().all():
            raise UserError(
                f"expected a latent of {image_id} that float16 can hold, got NaN or infinity; "
                "invert with dtype float32 or leave the image out"
            )
    return save({"latents": halves, "norms": norms.cpu()})
