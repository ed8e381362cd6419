"""The bank: per class, the latents of its labelled images, read from disk as they are needed.

`augment.bank.format` describes the files. They are mapped into memory, their size checked first,
since a file cut short while mapped would kill the reader; their digests are checked the first time
a process reads them.
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from augment.bank.format import (
    ENLARGED,
    Chunk,
    Manifest,
    Members,
    changed,
    check_file,
    pack,
    parts_of,
    read_manifest,
    read_record,
    require_same,
)
from augment.bank.vectors import read_vectors
from augment.core.errors import UserError
from augment.core.files import JsonObject, damaged, unreadable
from augment.core.schema import as_object
from augment.diffusion import local_recipe
from augment.diffusion.backbone import REFERENCE, Backbone, Recipe
from augment.diffusion.usage import KNOWN
from augment.measure.health import ClassHealth, Finding, Fitting, verdict
from augment.plan.plan import Plan
from augment.plan.planner import Images
from augment.sources.images import background_of

CPU = torch.device("cpu")

JUDGED = 16
"""Classes that the verdict is of, evenly chosen."""

_CURES = {"nulls": "with null_text", "references": "with a backbone that takes references"}
"""How a bank gets what the settings of its inversion alone do not give it."""


@dataclass(frozen=True, repr=False)
class LatentBank:
    """Inverted latents by class.

    Args:
        path: the folder.
        manifest: its manifest, without the chunks of its classes.
        chunks: the committed chunks of each class, in label order.
        members: the image ids of each class that this view shows, in label order.
        device: of the latents that are returned: ``cpu`` unless `to` moved them.

    Raises:
        UserError: by methods that take a class or plans, if the bank has no such class or does not
            store what is asked for, or a file is missing or damaged.
    """

    path: Path
    manifest: Manifest
    chunks: dict[str, list[Chunk]]
    members: Images
    device: torch.device = CPU
    _resident: dict[Path, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _checked: set[Path] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> "LatentBank":
        """Open a bank.

        Raises:
            UserError: there is none, it is of another schema, or its inversion did not finish.
        """
        path = Path(path)
        manifest = read_manifest(path)
        chunks: dict[str, list[Chunk]] = {entry.name: [] for entry in manifest.classes}
        missing, hashes = 0, array("q")
        for part in parts_of(path, manifest):
            record = read_record(part)
            if record is None:
                missing += len(part.ids)
                continue
            means = record.statistics.channel_means
            if means and len(means) != manifest.latent_shape[0]:
                place = part.stem.with_suffix(".json")
                raise damaged(place, record.WHAT, "means of other channels", record.CURE)
            hashes.extend([hash(image.id) for image in record.images])
            chunks[part.home.name].append(Chunk.of(part.stem, record, part.ids))
        manifest = replace(manifest, classes=[replace(c, chunks=[]) for c in manifest.classes])
        if missing:
            raise UserError(
                f"expected a complete bank at {path}, got one that lacks {missing} images; "
                "run the command that made it again to finish it"
            )
        packed = {name: tuple(chunk.packed for chunk in own) for name, own in chunks.items()}
        if len(np.unique(hashes)) < len(hashes):  # by chance, or of one image
            ids = [i for parts in packed.values() for part in parts for i in json.loads(part)]
            if len(set(ids)) < len(ids):
                raise UserError(f"expected each image once in {path}, got some twice; invert again")
        for name, own in chunks.items():
            if not filled(own):
                raise UserError(
                    f"expected a latent of each class in {path}, got none of {name!r}: all its "
                    "images are in rejects.jsonl; repair them or remove the class, and invert again"
                )
        return cls(path, manifest, chunks, Members(packed))

    def __repr__(self) -> str:
        count = sum(len(ids) for ids in self.members.values())
        shape = "×".join(map(str, self.manifest.latent_shape))
        many = f"{count} latents of {len(self.members)} classes"
        return f"LatentBank({str(self.path)!r}, {many}, {shape})"

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return list(self.members)

    @property
    def fingerprint(self) -> JsonObject:
        """How the latents were made; see `augment.bank.format.Fingerprint`."""
        return asdict(self.manifest.fingerprint)

    def prompt(self, class_name: str) -> str:
        """Return the prompt that a class was inverted with; empty if none."""
        self._chunks(class_name)
        return self._prompts[class_name]

    @cached_property
    def _prompts(self) -> dict[str, str]:
        return {entry.name: entry.prompt for entry in self.manifest.classes}

    @property
    def background(self) -> str:
        """The colour that replaced transparent pixels of its images."""
        return background_of(self.manifest.fingerprint.preprocessing)

    @property
    def inversion(self) -> JsonObject:
        """Method, steps, guidance and settings of the inversion."""
        return self.manifest.fingerprint.inversion

    @property
    def guidance(self) -> float:
        """Scale of guidance to sample with; of an older bank that of the inversion."""
        return self.manifest.guidance

    @property
    def inverted_by(self) -> str:
        """The inversion in words, such as ``ddim in 50 steps``."""
        below = "" if self.level is None else f" up to level {self.level:.3g}"
        return f"{self.inversion['method']} in {self.inversion['steps']} steps{below}"

    @property
    def made_by(self) -> tuple[str, bool, str, Fitting | None]:
        """What `findings` asks of a bank: inversion, noise, backbone, how images were fitted."""
        recipe, guidance = self.manifest.recipe, self.inversion["guidance"]
        plain = [*recipe] == ["name_or_path"] and guidance == 1  # and no LoRA or the like
        name = recipe["name_or_path"] if plain else ""
        return self.inverted_by, self.holds_noise, name, self._fitting()

    def _fitting(self) -> Fitting | None:
        """Return how images were brought to the model's format; None in older banks."""
        side = self.manifest.resolution
        if side is None:
            return None
        chunks = chain.from_iterable(map(filled, self.chunks.values()))
        images = [image for chunk in chunks for image in chunk.record.images]
        blurred = sum(image.side * ENLARGED < side for image in images)
        coloured = sum(image.colour is True for image in images)
        return Fitting(len(images), median(i.side for i in images), side, blurred, coloured)

    def verdict(self) -> list[Finding]:
        """Say whether the model knows the images, and what they lost on the way to it.

        Latents of at most `JUDGED` classes are read, and only if the model is one of `KNOWN`.
        """
        inversion, _, backbone, images = self.made_by
        judged = self.classes[:: -(-len(self.classes) // JUDGED)] if backbone in KNOWN else []
        return verdict([self.health(name) for name in judged], inversion, backbone, images)

    @property
    def level(self) -> float | None:
        """The noise level u of its latents; None is the noisiest one."""
        return self.inversion.get("level")

    @property
    def holds_clean(self) -> bool:
        """Whether its latents are clean, and plans say to which level noise is added to them."""
        return self.inversion["method"] == "noise"

    @property
    def holds_noise(self) -> bool:
        """Whether its latents are nothing but noise, as far as the inversion got there."""
        return self.level is None and not self.holds_clean

    @property
    def holds_references(self) -> bool:
        """Whether it holds references of its images, which condition the backbone."""
        return REFERENCE in self.manifest.fingerprint.backbone

    @cached_property
    def reference_shape(self) -> list[int]:
        """Shape of a reference."""
        return list(self._read(self._first, "references", "references")[0].shape[1:])

    @cached_property
    def _first(self) -> Chunk:
        return next(chunk for own in self.chunks.values() for chunk in filled(own))

    @property
    def recipe(self) -> Recipe:
        """Arguments of `load_backbone` that make the backbone without asking a hub."""
        name = self.manifest.fingerprint.backbone["name"]
        return local_recipe(self.manifest.recipe or {"name_or_path": name})

    def recipe_with(self, backbone: str | None = None) -> Recipe:
        """Return the arguments of `load_backbone` that make the backbone, or another one.

        Args:
            backbone: name or path of another; the options stay.

        Raises:
            UserError: the backbone is no longer at its path.
        """
        recipe = self.recipe
        if backbone:
            recipe = local_recipe({**self.manifest.recipe, "name_or_path": backbone}, named=True)
        place = Path(recipe["name_or_path"])
        if place.is_absolute() and not place.exists():
            raise UserError(
                f"expected the backbone that made the bank at {place}, got nothing there; say "
                "where it is with --backbone"
            )
        return recipe

    def to(self, device: torch.device | str) -> "LatentBank":
        """Load all latents, float16, into a device's memory.

        What is computed there equals what a CPU computes but for the last bits.

        Raises:
            UserError: they do not fit, or rules could not be computed there.
        """
        device = torch.device(device)
        if device.type == "mps":
            raise UserError(
                "expected a device with float64, which rules need, got mps; leave the bank on "
                "disk, and centroids are mixed on the CPU"
            )
        kinds = ("latents",) if self.level is None else ("latents", "clean")
        chunks = [(c, kind) for own in self.chunks.values() for c in filled(own) for kind in kinds]
        size = sum(chunk.files[kind].bytes for chunk, kind in chunks)
        room = _free_memory(device)
        if size > room:
            raise UserError(
                f"expected memory for {size:,} bytes of latents on {device}, got {room:,}; leave "
                "the bank on disk, from where it is read as needed"
            )
        # cloned, since on the CPU they would stay the file's
        resident = {
            c.file(kind): self._read(c, kind, kind)[0].clone().to(device) for c, kind in chunks
        }
        return replace(self, device=device, _resident=resident)

    def gather(
        self, plans: Sequence[Plan], kind: str = "latents"
    ) -> tuple[Float[Tensor, "b k *d"], Float[Tensor, "b k"]]:
        """Read the latents of plans' members and their weights, float32 on the bank's device.

        Only their rows are read, of ``kind`` latents, clean or references. A plan with fewer
        members than another has points of zeros at its end, of weight 0, which no rule sees.

        Raises:
            UserError: the bank lacks one of the images, a plan's lists differ in length, or a chunk
                is missing or damaged.
        """
        count = max((len(plan.members) for plan in plans), default=0)
        shape = self.reference_shape if kind == "references" else self.manifest.latent_shape
        full = all(len(plan.members) == count for plan in plans)
        make = torch.empty if full else torch.zeros
        points = make(len(plans) * count, *shape, device=self.device)
        weights = torch.zeros(len(plans), count, dtype=torch.float64)
        spots: dict[str, dict[str, list[int]]] = {}
        for b, plan in enumerate(plans):
            for what, values in (("weight", plan.weights), ("class", plan.member_classes)):
                if not 0 < len(plan.members) == len(values):
                    raise UserError(
                        f"expected a {what} for each member of a plan, got {len(values)} for "
                        f"{len(plan.members)} members; take the plan as the planner made it"
                    )
            weights[b, : len(plan.weights)] = torch.tensor(plan.weights, dtype=torch.float64)
            homes = zip(plan.member_classes, plan.members, strict=True)
            for k, (name, image_id) in enumerate(homes):
                spots.setdefault(name, {}).setdefault(image_id, []).append(b * count + k)
        for name, wanted in spots.items():
            for chunk, rows in self._places(name, wanted):
                pairs = [(spot, row) for i, row in rows.items() for spot in wanted[i]]
                places, rows = torch.tensor(pairs, device=self.device).T
                stored = self._stored(chunk, kind)
                found = stored[rows.to(stored.device)].float()
                points.index_copy_(0, places, found.to(self.device))
        return points.view(len(plans), count, *shape), weights.float().to(self.device)

    def _places(self, class_name: str, ids: Iterable[str]) -> list[tuple[Chunk, dict[str, int]]]:
        """Return, by chunk, the rows of some members of a class."""
        wanted = set(ids)
        shown = wanted.intersection(self.members.get(class_name, ()))
        if shown < wanted:
            missing = next(image_id for image_id in ids if image_id not in shown)
            raise UserError(
                f"expected the plan's images in class {class_name!r} of {self.path}, got no "
                f"{missing} there; use the bank that the plan was made for"
            )
        found = ((c, c.rows, wanted & c.rows.keys()) for c in self.chunks[class_name])
        return [(chunk, {i: rows[i] for i in here}) for chunk, rows, here in found if here]

    def digests(self, class_name: str) -> dict[str, str]:
        """Return the SHA-256 of a class's image files by id, in the order of ``members``."""
        records = (chunk.record for chunk in self._chunks(class_name))
        digests = {image.id: image.sha256 for record in records for image in record.images}
        return {image_id: digests[image_id] for image_id in self.members[class_name]}

    def captions(self, class_name: str) -> dict[str, str]:
        """Return what images of a class were inverted with in place of its prompt, by id."""
        records = (chunk.record for chunk in self._chunks(class_name))
        return {i.id: i.caption for record in records for i in record.images if i.caption}

    def latents(self, class_name: str) -> Float[Tensor, "n c h w"]:
        """Read the latents of a class in float32, in the order of ``members``."""
        return self._rows(class_name, lambda c: self._stored(c, "latents")).float()

    def clean(self, class_name: str) -> Float[Tensor, "n c h w"]:
        """Read the clean latents of a class in float32, in the order of ``members``."""
        kind = "latents" if self.holds_clean else "clean"
        return self._rows(class_name, lambda c: self._stored(c, kind)).float()

    def references(self, class_name: str) -> Float[Tensor, "n *d"]:
        """Read the references of a class in float32, in the order of ``members``."""
        return self._rows(class_name, lambda c: self._stored(c, "references")).float()

    def errors(self, class_name: str) -> Float[Tensor, " n"]:
        """Read the mean squared error of each image of a class to its latent sampled back."""
        return self._rows(class_name, lambda c: self._read(c, "latents", "errors")[0]).clone()

    def health(self, class_name: str) -> ClassHealth:
        """Measure the latents of a class, and what its images lose, if the bank keeps that."""
        errors = self.errors(class_name) if "errors" in self.manifest.keeps else None
        return ClassHealth.of(class_name, self.latents(class_name), errors)

    def null_embeddings(
        self, class_name: str
    ) -> tuple[Float[Tensor, "g steps ..."], Int[Tensor, " n"]]:
        """Read a class's embeddings by null-text inversion, float16.

        Returns:
            The embeddings, and the row of each of ``members`` among them.
        """
        nulls, rows, offset = [], {}, 0
        for chunk in filled(self._chunks(class_name)):
            part, places = self._read(chunk, "nulls", "nulls", "null_rows")
            nulls.append(part)
            rows |= zip(chunk.rows, (places + offset).tolist(), strict=True)
            offset += len(part)
        return torch.cat(nulls), torch.tensor([rows[i] for i in self.members[class_name]])

    def features(self, which: str | Path) -> dict[str, Float[Tensor, "n f"]]:
        """Return a vector of every image, by class, to choose nearest neighbours by.

        Args:
            which: ``latent``, the flattened latents, which are all read into memory; or a
                .safetensors file that holds a vector under each image's id, all of one length.

        Returns:
            Vectors in the order of ``members``.

        Raises:
            UserError: no such file, it lacks an image, or a vector is of another length or not
                finite.
        """
        if which == "latent":
            return {name: self.latents(name).flatten(1) for name in self.classes}
        ids = [image_id for members in self.members.values() for image_id in members]
        vectors = read_vectors(Path(which), ids)
        return {name: torch.stack([vectors[i] for i in m]) for name, m in self.members.items()}

    def channel_means(self, class_name: str) -> Float[Tensor, " c"]:
        """Return the mean of each channel of a class's latents, from their records."""
        chunks = filled(self._chunks(class_name))
        rows = torch.tensor([chunk.means for chunk in chunks])
        counts = torch.tensor([len(chunk.rows) for chunk in chunks])
        return (counts[:, None] * rows).sum(0) / counts.sum()

    def largest_mean(self, class_name: str) -> float:
        """Return the largest absolute channel mean of a class's latents, from their records."""
        return self.channel_means(class_name).abs().max().item()

    def subset(self, keep: Callable[[str], bool]) -> "LatentBank":
        """Show only the images whose id passes ``keep``; classes and labels stay.

        Raises:
            UserError: a class would be left without an image.
        """
        kept: dict[str, tuple[str, ...]] = {}
        for name, ids in self.members.items():
            shown = [image_id for image_id in ids if keep(image_id)]
            if not shown:
                raise UserError(
                    f"expected at least one image of class {name!r}, got none; keep one"
                )
            kept[name] = (pack(shown),)
        return replace(self, members=Members(kept))

    def check(self, backbone: Backbone) -> None:
        """Refuse a backbone that the latents were not made with.

        Raises:
            BankMismatch: the first field that differs is named.
        """
        require_same(self.path, self.manifest.fingerprint.backbone, backbone.fingerprint)
        have, want = self.manifest.latent_shape, list(backbone.latent_shape)
        require_same(self.path, {"latent shape": have}, {"latent shape": want})

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of what images depend on: latents, embeddings, ids and prompts."""
        kinds = ("latents", "nulls") if self.level is None else ("latents", "nulls", "clean")
        kinds += ("references",) if self.holds_references else ()
        digest = hashlib.sha256(b"[")  # of a JSON list that is never whole in memory
        for number, (name, chunks) in enumerate(self.chunks.items()):
            files = [[c.files.get(k) for k in kinds] for c in chunks]
            facts = [name, self.prompt(name), [c.ids for c in chunks], files]
            content = json.dumps(facts, default=as_object)
            digest.update((", " if number else "").encode() + content.encode())
        digest.update(b"]")
        return digest.hexdigest()

    def _chunks(self, class_name: str) -> list[Chunk]:
        if class_name not in self.chunks:
            raise UserError(
                f"expected a class out of {', '.join(self.classes)}, got {class_name!r}"
            )
        return self.chunks[class_name]

    def _rows(self, class_name: str, read: Callable[[Chunk], Tensor]) -> Tensor:
        """Read a class's rows of a kind, in the order of its members."""
        chunks = filled(self._chunks(class_name))
        ids, members = tuple(i for c in chunks for i in c.rows), self.members[class_name]
        parts = [read(chunk) for chunk in chunks]
        stored = parts[0] if len(parts) == 1 else torch.cat(parts)
        if ids == members:
            return stored
        rows = {image_id: row for row, image_id in enumerate(ids)}
        return stored[[rows[image_id] for image_id in members]]

    def _stored(self, chunk: Chunk, kind: str) -> Tensor:
        """Return a chunk's latents or clean ones as stored, from the device or the disk."""
        resident = self._resident.get(chunk.file(kind)) if self._resident else None
        return self._read(chunk, kind, kind)[0] if resident is None else resident

    def _read(self, chunk: Chunk, kind: str, *keys: str) -> list[Tensor]:
        """Read tensors of one of a chunk's files."""
        path, expected = chunk.file(kind), chunk.files.get(kind)
        if expected is None or not set(keys) <= set(expected.holds):
            raise UserError(
                f"expected a bank that keeps {keys[0]} at {self.path}, got one of "
                f"{self.inversion['method']} that does not; invert again "
                + _CURES.get(kind, f"and keep {keys[0]}")
            )
        try:
            if path not in self._checked:
                check_file(path, expected)
                with safe_open(path, framework="pt") as file:
                    self._check_shape(chunk, path, file)
                self._checked.add(path)
            elif os.stat(path).st_size != expected.bytes:  # noqa: PTH116, a microsecond less
                raise changed(path, "a file of another size")
            with safe_open(path, framework="pt") as file:
                return [file.get_tensor(key) for key in keys]
        except SafetensorError as error:
            raise changed(path, str(error)) from None
        except OSError as error:
            raise unreadable(path, "a file of a bank", error) from None

    def _check_shape(self, chunk: Chunk, path: Path, file: Any) -> None:
        """Refuse a file without a row of the right shape for each image."""
        shape = self.manifest.latent_shape
        for key in set(file.keys()) & {"latents", "clean", "errors", "null_rows", "references"}:
            found = file.get_slice(key).get_shape()
            wanted = [len(chunk.rows), *(shape if key in ("latents", "clean") else [])]
            if key == "references":
                wanted += found[1:] if chunk is self._first else self.reference_shape
            if found != wanted:
                flaw = f"{key} of shape {found}, not {wanted}"
                raise changed(path, flaw)


def filled(chunks: list[Chunk]) -> list[Chunk]:
    """Return the chunks that contain at least one image."""
    return [chunk for chunk in chunks if "latents" in chunk.files]


def _free_memory(device: torch.device) -> int:
    """Return four fifths of the free bytes of a device."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS
        return sys.maxsize
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free * 4 // 5
