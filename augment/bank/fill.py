"""Filling a bank: the job that inverts a source's images.

A unit is up to 256 images, of several classes where these are small, so that batches are full. The
manifest assigns each image to a chunk and a unit before the work begins; images that are added to
the source later become further chunks, and what is committed never moves. Each image's file is read
once; one that cannot be read, or whose latent is not usable, is rejected and listed with the
reason, and too many rejects stop the job.
"""

import errno
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.chunking import assign_chunks, intact, size_of
from augment.bank.format import (
    CHUNK,
    ENLARGED,
    BankSettings,
    ChunkPlan,
    ChunkRecord,
    Committed,
    FileRecord,
    Fingerprint,
    ImageRecord,
    Manifest,
    Reject,
    Statistics,
    file_of,
    parts_of,
    read_manifest,
    require_same_guidance,
    require_same_making,
)
from augment.centroid.prior import nominal_norm
from augment.core.errors import (
    EnlargedWarning,
    ImageRejected,
    Missing,
    UnknownImagesWarning,
    UserError,
    first_few,
)
from augment.core.files import JsonObject, check_folder, in_use, sha256, unreadable, write_bytes
from augment.core.registry import refuse_reserved
from augment.core.schema import write
from augment.diffusion import load_backbone, parse_dtype
from augment.diffusion.backbone import REFERENCE, Backbone, Recipe, check_batch
from augment.diffusion.conditions import Given, Referred, Schedule
from augment.diffusion.solver import sample
from augment.diffusion.usage import Usage
from augment.inversion import INVERTERS, Inverter, check_guidance, inverted, inverter
from augment.inversion.noise import Noise
from augment.jobs.job import planning_device, run
from augment.sources import Folder, Source
from augment.sources.captions import captions_of, check_captions
from augment.sources.decoding import open_image, warn_once
from augment.sources.images import FITTING, fit, has_colour, parse_colour, pixels_of, preprocessing
from augment.sources.prompts import by_class, prompts_of
from augment.sources.source import check_share, choose_backbone, refuse_rejects

PIXELS = 2**26
"""Maximum pixels, of all channels, that a unit holds in memory."""

CHUNK_FILE = re.compile(r"chunk-[0-9]{4,}(\.clean|\.nulls|\.references)?\.(safetensors|json)")

_LONGEST = 64  # captions that are embedded before anything is written

REJECTED = ("id", "bytes", "sha256", "reason")
"""Keys of an image in rejects.jsonl."""


@dataclass
class LoadedImage:
    """An image of a unit.

    Args:
        record: its record.
        pixels: (C, R, R); None if it could not be read.
        reason: why it is rejected; empty if it is not.
        converted: what changed its colours on the way to sRGB, if anything.
        row: of its latent among those of the unit.
    """

    record: ImageRecord
    pixels: Tensor | None = None
    reason: str = ""
    converted: str = ""
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class InvertSettings:
    """Invert labelled images into a bank of latents.

    Args:
        images: folder with one sub-folder of image files a class; or another source, such as
            FewShot with --images.source DIR --images.shots 5, or as YAML in a --config.
        bank: folder of the bank, made if needed; an interrupted job is resumed, and images added
            since are appended.
        backbone: diffusion model: tiny, tiny-cifar, sd15, sdxl and so on, a folder or .safetensors
            file of a checkpoint, or the id of one on the Hugging Face hub; auto is the embedded
            tiny for grey images, and tiny-cifar if some have colour; a bank that was begun keeps
            its own.
        prompt: template of the prompts, such as 'a photo of a {name}'; WordNet ids of ImageNet get
            their names. By default that of the model's family; '' is none.
        prompts: prompts by class, as YAML such as '{Coat: top}'; they replace the template's.
        captions: captions of the images to invert with, in place of prompts: a metadata.jsonl with
            file_name and text, or txt for a text file beside each image. Images are still
            synthesized with the prompts.
        inversion: method: forward_start, fireflow, midpoint, fixed_point, ddim, negative_prompt,
            null_text, or noise (no network: latents stay clean, and are noised when sampled).
        steps: number of solver steps to the noisiest level; by default that of the model's family,
            such as 25.
        level: where the inversion stops, in (0, 1], as a share of the steps; below 1 the clean
            latents are kept too. With noise, the level is an option of synthesize instead.
        guidance: scale of classifier-free guidance, of the inversion and to sample with; by default
            the inversion is without (1; null_text 7.5), and images are sampled with that of the
            model's family.
        batch_size: images a network call; halved if a GPU's memory is too small.
        device: device such as cuda or cpu; by default the GPU if there is one.
        dtype: number type of the network, float32, float16 or bfloat16; by default the backbone's.
        inversion_options: further options of the inversion, as YAML such as '{iterations: 3}'.
        backbone_options: options of the backbone, as YAML such as '{resolution: 384, lora: FILE}'.
        errors: sample every latent back and record how much is lost; false halves the time.
        clean: keep the clean latents too.
        max_rejects: largest share of images that may be left out because they cannot be read; one
            may be, unless it is 0.
        links: follow links that lead out of the folder.
        nested: read the images in all sub-folders of a class folder too.
        background: colour behind transparent pixels, such as '#808080'; by default white.
        executor: where units of work are done: local, in this process (under torchrun or in a Slurm
            array, this process does its share), or ray.
        dry_run: do and keep one unit of the work, and report how long all will take.
    """

    images: Source | str
    bank: str
    backbone: str = "auto"
    prompt: str | None = None
    prompts: dict[str, str] | None = None
    captions: str | None = None
    inversion: str = "forward_start"
    steps: int | None = None
    level: float = 1.0
    guidance: float | None = None
    batch_size: int = 64
    device: str | None = None
    dtype: str | None = None
    inversion_options: JsonObject | None = None
    backbone_options: JsonObject | None = None
    errors: bool = True
    clean: bool = False
    max_rejects: float = 0.05
    links: bool = False
    nested: bool = False
    background: str | None = None
    executor: str = "local"
    dry_run: bool = False

    def source(self) -> Source:
        """Return the source of the images."""
        if isinstance(self.images, str):
            source: Source = Folder(self.images, self.links, nested=self.nested)
        elif self.links or self.nested:
            raise UserError(
                f"expected {'links' if self.links else 'nested'} with a folder of images, got "
                f"{type(self.images).__name__}; leave it out, or give it to a Folder therein"
            )
        else:
            source = self.images
        if self.background:
            source.background = parse_colour(self.background)
        return source

    def model(self, source: Source) -> str:
        """Return the name of the backbone; see `augment.sources.source.choose_backbone`."""
        begun = Path(self.bank) / "manifest.json"
        if self.backbone == "auto" and begun.exists():
            recipe = read_manifest(Path(self.bank)).recipe
            if not recipe:
                raise UserError(
                    f"expected a backbone by name, as the bank {self.bank} does not say which made "
                    "it, got auto; name it with --backbone"
                )
            return str(recipe["name_or_path"])
        return choose_backbone(self.backbone, source.examples())


def fill_bank(
    path: str | Path,
    backbone: Backbone,
    source: Source,
    prompts: dict[str, str] | None = None,
    inversion: str = "forward_start",
    *,
    guidance: float | None = None,
    batch_size: int = 64,
    stored: Sequence[str] = ("errors",),
    max_rejects: float = 0.05,
    captions: dict[str, str] | None = None,
    **settings: Any,
) -> LatentBank:
    """Invert a source's images into a bank; what a bank of the same settings lacks is added.

    Args:
        path: the bank's folder, made if needed.
        backbone: the model to invert with.
        source: labelled images, such as `augment.sources.Folder`.
        prompts: a prompt for each class; by default by the template of the backbone's family, if it
            has one. An empty dictionary is none.
        inversion: a key of `augment.inversion.INVERTERS`.
        guidance: scale of classifier-free guidance, of the inversion and to sample with; by default
            `augment.invert`'s, and to sample with that of the backbone's family.
        batch_size: images a network call; halved if a GPU's memory is too small.
        stored: what to store beside latents: ``errors`` of reconstruction, for which every latent
            is sampled back, which doubles the time of most inversions; ``clean`` latents.
        max_rejects: share of images that may be rejected, because they cannot be read or their
            latents are not usable; more stop the job.
        captions: a caption of each image by its id, to invert it with in place of its class's
            prompt.
        settings: those of the inversion: its solver ``steps``, by default those of the backbone's
            family; the ``level`` where it stops (if below 1, ``clean`` latents are stored too);
            and its own, such as ``iterations`` of ``fixed_point``.

    Raises:
        ImageRejected: too many images are rejected.
        BankMismatch: the folder holds a bank of other settings.
        UserError: the bank holds other images, a prompt or setting is unknown, or another run
            holds the folder.

    Warns:
        EnlargedWarning: images are much smaller than the backbone's.
        UnknownImagesWarning: the backbone does not know such images; see `LatentBank.verdict`.
    """
    method = inverter(inversion, **{"steps": backbone.usage.steps, **settings})
    texts, template = _prompts(backbone, source.classes, None if prompts is None else "", prompts)
    job = InversionJob(
        Path(path), source, backbone, method, guidance, texts, batch_size, tuple(stored),
        max_rejects, template=template, captions=captions or {},
    )  # fmt: skip
    run(job)
    bank = LatentBank.open(path)
    for finding in bank.verdict():
        if finding.topic == "Model" and finding.level == "warning":
            warnings.warn(finding.text, UnknownImagesWarning, stacklevel=2)
    return bank


def _prompts(
    backbone: Backbone, classes: list[str], template: str | None, own: dict[str, str] | None
) -> tuple[dict[str, str], str]:
    """Return the prompts of classes, and the template that they are by.

    Without a template they are those that the backbone was adapted with, or by its family's.
    """
    adapted: dict[str, str] = by_class(getattr(backbone, "adapted_prompts", {}), classes)
    if template is None and adapted:
        prompts = {name: adapted[name] for name in classes if name in adapted}
        prompts |= by_class(own or {}, classes)
        if missing := [name for name in classes if name not in prompts]:
            raise UserError(
                f"expected classes out of {first_few(list(adapted))}, which the backbone was "
                f"adapted to, got {missing[0]!r}; adapt one to that class too, or give a prompt"
            )
        return prompts, ""
    template = backbone.usage.template if template is None else template
    return prompts_of(classes, template, own), template


def _or(steps: int | None, usual: int) -> int:
    """Return a number of steps; 0, which is refused later, is one."""
    return usual if steps is None else steps


@dataclass
class InversionJob:
    """The job of filling a bank: an `augment.jobs.job.Job`.

    Args:
        path, source, backbone, guidance, prompts, batch_size, stored, max_rejects: see `fill_bank`.
        method: the inversion.
        where: device and dtype of the backbone, for workers that load it themselves.
        template: of the prompts, if they are by one.
        captions: by image id, of all images or of none.
    """

    path: Path
    source: Source
    backbone: Backbone | None
    method: Inverter
    guidance: float | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    batch_size: int = 64
    stored: tuple[str, ...] = ("errors",)
    max_rejects: float = 0.05
    where: dict[str, Any] = field(default_factory=dict)
    template: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    usage: Usage = field(default=Usage(), init=False)
    asked: float | None = field(default=None, init=False)
    title: str = field(default="invert", init=False)
    manifest: Manifest | None = field(default=None, init=False)
    recipe: Recipe = field(default_factory=dict, init=False)
    units: list[list[ChunkPlan]] = field(default_factory=list, init=False)
    side: int = field(default=0, init=False)

    @classmethod
    def of(cls, settings: InvertSettings) -> "InversionJob":
        """Load the backbone and the list of images that settings ask for; see `InvertSettings`."""
        source, template = settings.source(), settings.prompt
        prompts_of(source.classes, template or "", settings.prompts)  # before it loads
        captions = captions_of(source, settings.captions) if settings.captions else {}
        others, options = settings.inversion_options or {}, settings.backbone_options or {}
        refuse_reserved(others, "steps", "level", "guidance", "batch_size")
        refuse_reserved(options, "name_or_path", "device", "dtype")
        if settings.level != 1:
            others = {**others, "level": settings.level}
        inverter(settings.inversion, steps=_or(settings.steps, 25), **others)  # before it loads
        where = {"device": settings.device, "dtype": parse_dtype(settings.dtype)}
        device = planning_device(settings.device, settings.executor, settings.dry_run)
        here = where | {"device": device}
        kept = [name for name in ("errors", "clean") if getattr(settings, name)]
        backbone = load_backbone(settings.model(source), **here, **options)
        prompts, template = _prompts(backbone, source.classes, template, settings.prompts)
        steps = _or(settings.steps, backbone.usage.steps)
        method = inverter(settings.inversion, steps=steps, **others)
        return cls(
            Path(settings.bank), source, backbone, method, settings.guidance,
            prompts, settings.batch_size, tuple(kept), settings.max_rejects, where, template,
            captions,
        )  # fmt: skip

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is read or written."""
        check_batch(self.batch_size)
        check_folder(self.path)
        self.source.keep_out(self.path)
        check_share(self.max_rejects)
        names = list(self.source.ids)
        self.prompts = by_class(self.prompts, names)
        unknown = self.prompts.keys() - set(names)
        if unknown:
            raise UserError(
                f"expected prompts for classes out of {', '.join(names)}, got one for "
                f"{min(unknown)!r}; choose one of these"
            )
        for name in self.stored:
            if name not in ("errors", "clean"):
                raise UserError(f"expected errors or clean to store, got {name!r}")
        if self.method.level < 1 and "clean" not in self.stored:  # the noise is mixed apart
            self.stored += ("clean",)
        if isinstance(self.method, Noise):  # they are its latents
            self.stored = tuple(kind for kind in self.stored if kind != "clean")
        assert self.backbone is not None  # only a copy sent to a worker has none
        texts = [self.prompts.get(name, "") for name in names]
        scale = self._choose_guidance(any(texts) or REFERENCE in self.backbone.fingerprint)
        check_guidance(self.method, self.backbone, texts, scale)
        for text in dict.fromkeys(texts):  # one by one: those of 1000 classes fill a GPU
            self.backbone.condition([text])
        if self.captions:
            check_captions(self.source, self.captions)
            for text in sorted(self.captions.values(), key=len)[-_LONGEST:]:
                self.backbone.condition([text])

    def _choose_guidance(self, conditioned: bool) -> float:
        """Fill in the guidance of sampling, and that of the inversion, which is returned."""
        assert self.backbone is not None
        usual, given = self.backbone.usage.guidance, self.guidance is not None
        self.asked = self.guidance
        if self.guidance is None:
            self.guidance = self.method.guidance
        if not math.isfinite(self.guidance):
            raise UserError(f"expected a finite guidance, got {self.guidance}; 1 is none")
        sampling = self.guidance if given or self.guidance != 1 or not conditioned else usual
        self.usage = Usage(self.template, sampling, self.method.steps)
        return self.guidance

    def chosen(self) -> str:
        """Return a line of what was chosen; empty for a family that is used without prompts."""
        usage, some = self.usage, next((text for text in self.prompts.values() if text), "")
        if self.backbone is None or self.backbone.usage == Usage():
            return ""
        by = f" by {usage.template!r}" if usage.template else ""
        by = " (captions to invert)" + by if self.captions else by
        return (
            f"prompts{by}, such as {some!r}; {usage.steps} steps; guidance {self.guidance:g} to "
            f"invert and {usage.guidance:g} to sample (--prompt '' and --guidance 1 turn them off)"
        )

    def __getstate__(self) -> JsonObject:
        """Leave out the backbone where a worker knows how to load it."""
        return {**self.__dict__, "backbone": None if self.recipe else self.backbone}

    def described(self, backbone: Backbone) -> BankSettings:
        """Return how the latents are made."""
        method = {
            "method": next(k for k, v in INVERTERS.items() if type(self.method) is v),
            "solver": self.method.solver,
            "guidance": self.guidance,
            **{key: value for key, value in vars(self.method).items() if key != "level"},
            **({"captions": True} if self.captions else {}),
        }
        if self.method.level < 1:
            method["level"] = self._level(backbone)
        versions = {name: version(name) for name in ("torch", "diffusers", "safetensors")}
        return BankSettings(
            list(backbone.latent_shape),
            Fingerprint(backbone.fingerprint, method, preprocessing(self.source.background)),
            backbone.recipe,
            str(self.source.root.absolute()),
            list(self.stored),
            versions | {"device": backbone.device.type},
            usage=self.usage if self.template or self.usage.guidance != self.guidance else None,
            resolution=backbone.resolution,
        )

    def _level(self, backbone: Backbone) -> float | None:
        """Return the noise level of the latents; None is the noisiest one."""
        if isinstance(self.method, Noise):
            return 0.0
        grid = backbone.process.levels(self.method.steps)
        return None if self.method.level == 1 else grid[self.method.steps_made]

    def plan(self) -> list[int]:
        """Write the manifest, or check and extend it; return the number of images of each unit."""
        backbone = self.backbone
        assert backbone is not None
        new, old = self.described(backbone), self._old_manifest()
        self.recipe = backbone.recipe  # not that of an older run
        if old is not None:
            require_same_making(self.path, old, new)
            if self.asked is not None:
                require_same_guidance(self.path, old, new)
            kept = ("recipe", "made_with", "usage", "resolution")
            same = {key: getattr(old, key) for key in kept}
            new = replace(new, fingerprint=old.fingerprint, **same)
        limit = 16 if self.method.negative == "null_embeddings" else CHUNK  # these are large
        size = max(min(limit, CHUNK, PIXELS // (backbone.channels * backbone.resolution**2)), 1)
        self.side = backbone.resolution
        where = self.path, old, self.source, self.prompts
        classes, committed = assign_chunks(*where, size, self.side, self.captions)
        self.manifest = Manifest(**vars(new), schema=Manifest.SCHEMA, classes=classes)
        if self.manifest != old:
            write(self.path / "manifest.json", self.manifest)
        units: dict[int, list[ChunkPlan]] = {}
        for part in parts_of(self.path, self.manifest):
            part.committed = committed.get(part.stem)
            units.setdefault(part.home.unit, []).append(part)
        self.units = [units[number] for number in sorted(units)]
        _remove_strays(self.path, {part.stem for part in self._parts})
        return [sum(len(part.ids) for part in parts) for parts in self.units]

    def _old_manifest(self) -> Manifest | None:
        """Read the manifest; None in a new folder."""
        with suppress(Missing):
            return read_manifest(self.path)
        # another rank may have begun since
        if in_use(self.path) and not (self.path / "manifest.json").exists():
            raise UserError(
                f"expected {self.path} to be new, empty or a bank, got a folder in use without a "
                "manifest.json; use a new one, or latent-augment verify --repair if it is a bank"
            )
        return None

    @property
    def _parts(self) -> Iterator[ChunkPlan]:
        return chain.from_iterable(self.units)

    def committed(self, unit: int) -> int:
        """Return the bytes of a unit's files, its records among them; 0 if it is not finished."""
        sizes = [self._size(part) for part in self.units[unit]]
        return sum(sizes) if all(sizes) else 0

    def _size(self, part: ChunkPlan) -> int:
        """Return the bytes of a chunk's files; 0 if it is not whole, so that it is made again."""
        committed = self._read(part)
        size = size_of(part.stem, committed.files) if committed else 0
        if not size:
            part.committed = None
        return size

    def _read(self, part: ChunkPlan) -> Committed | None:
        """Return what is committed of a chunk; its record is read unless that was done before."""
        if part.committed is None and (record := intact(part)) is not None:
            part.committed = Committed.of(record, self.side)
        return part.committed

    def start(self) -> Callable[[int], None]:
        """Load the backbone, unless it is here."""
        return partial(self.work, self.backbone or load_backbone(**self.recipe, **self.where))

    def work(self, backbone: Backbone, unit: int) -> None:
        """Read, invert and commit the images of a unit."""
        parts = self.units[unit]
        loaded = [[load_image(self.source, backbone, i) for i in part.ids] for part in parts]
        self._check_colours([image for images in loaded for image in images])
        pairs = list(zip(parts, loaded, strict=True))
        for image in chain.from_iterable(loaded):
            image.record.caption = self.captions.get(image.record.id)
        usable = [
            (image, image.record.caption or part.home.prompt)
            for part, row in pairs
            for image in row
            if image.pixels is not None
        ]
        made = self.make(backbone, *map(list, zip(*usable, strict=True))) if usable else {}
        for row, (image, _) in enumerate(usable):
            image.row, image.reason = row, rejection_reason(made, row)
        self._check_rejects(unit, [image for images in loaded for image in images if image.reason])
        for part, images in pairs:
            part.committed = Committed.of(commit(part, made, images), self.side)

    def make(
        self, backbone: Backbone, loaded: list[LoadedImage], texts: list[str]
    ) -> dict[str, Tensor]:
        """Invert images; return the tensors that are stored, on the CPU."""
        images = torch.stack([image.pixels for image in loaded if image.pixels is not None])
        seeds = [int(image.record.sha256[:8], 16) for image in loaded]
        scale = self.guidance or 0.0
        made = inverted(self.method, backbone, images, texts, scale, self.batch_size, seeds)
        for key in {"latents", "nulls"} & made.keys():
            made[key] = made[key].half()
        if "errors" in self.stored:
            latents, steps = made["latents"].float(), self.method.steps
            words: Given = texts
            if "references" in made:
                words = Referred(texts, made["references"].float())
            negative: Given = words if self.method.negative == "prompt" else None
            if "nulls" in made:
                nulls = made["nulls"].float()[made["null_rows"]]
                grid = backbone.process.levels(steps)[: nulls.shape[1] + 1]
                negative = Schedule.by_step(grid, nulls)
            back = sample(
                backbone, latents, words, self.method.solver, steps, scale, self.batch_size,
                negative=negative, level=self._level(backbone),
            )  # fmt: skip
            made["errors"] = (back.cpu() - images).square().flatten(1).mean(1)
        if "clean" in self.stored:
            pieces = images.split(self.batch_size)
            with torch.no_grad():
                clean = [backbone.encode(piece.to(backbone.device)) for piece in pieces]
            made["clean"] = torch.cat(clean).half()
        return {key: tensor.cpu() for key, tensor in made.items()}

    def _check_colours(self, images: list[LoadedImage]) -> None:
        """Warn where a bank of an older version, which did not convert colours, is resumed."""
        odd = next((image for image in images if image.converted), None)
        if odd and self.manifest and self.manifest.fingerprint.preprocessing == FITTING:
            warn_once(
                "colours",
                f"expected colours as they are stored in the bank {self.path} of an older version, "
                f"got {odd.record.id} with {odd.converted}, which is converted now; invert into "
                "a new folder to read all images alike",
            )

    def _check_rejects(self, unit: int, rejected: list[LoadedImage]) -> None:
        """Stop before more images are rejected than ``max_rejects`` allows."""
        if not rejected:
            return
        planned = sum(len(part.ids) for part in self._parts)
        others = chain.from_iterable(parts for k, parts in enumerate(self.units) if k != unit)
        count = len(rejected) + sum(len(part.rejects) for part in others if self._read(part))
        first = f"{rejected[0].record.id} ({rejected[0].reason})"
        refuse_rejects(count, planned, self.max_rejects, "images", first)

    def finish(self) -> None:
        """List the rejected images, and warn if images were enlarged more than `ENLARGED`-fold."""
        done = [chunk for part in self._parts if (chunk := self._read(part))]
        rejects = [reject for part in self._parts for reject in part.rejects]
        file = self.path / "rejects.jsonl"
        if rejects:
            facts = ({key: getattr(reject, key) for key in REJECTED} for reject in rejects)
            lines = "".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts)
            write_bytes(file, lines.encode("utf-8", "surrogatepass"))
        else:
            file.unlink(missing_ok=True)
        if enlarged := sum(chunk.enlarged for chunk in done):
            least, name = min((chunk.smallest for chunk in done), key=itemgetter(0))
            warnings.warn(
                f"expected images of about {self.side} pixels, got {enlarged} of "
                f"{sum(chunk.images for chunk in done)} that are enlarged more than "
                f"{ENLARGED}-fold ({name}: {least}); their latents are of blurred images",
                EnlargedWarning,
                stacklevel=4,
            )


def _remove_strays(root: Path, planned: set[Path]) -> None:
    """Remove files of chunks that are no longer planned, whose names others may get."""
    for folder in (path for path in root.iterdir() if path.name.isdigit() and path.is_dir()):
        files: list[Path] = []
        with suppress(FileNotFoundError):  # another process removed it, as it was empty
            files = list(folder.iterdir())
        for file in files:
            if (
                CHUNK_FILE.fullmatch(file.name)
                and file.with_name(file.name.split(".")[0]) not in planned
            ):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()  # if it is empty


def load_image(source: Source, backbone: Backbone, image_id: str) -> LoadedImage:
    """Read an image; one that cannot be read has a reason to reject it."""
    record = ImageRecord(image_id, 0, "", 0)
    try:
        content = source.read(image_id)
        record = replace(record, bytes=len(content), sha256=sha256(content))
        image = open_image(content, source.background, image_id)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise unreadable(source.root / image_id, "an image", error) from None
        record = replace(record, bytes=source.size(image_id))
        return LoadedImage(record, reason=error.strerror or str(error))
    except ImageRejected as error:
        return LoadedImage(record, reason=str(error))
    pixels = fit(pixels_of(image, backbone.channels), backbone.resolution)
    lost = backbone.channels == 1 and has_colour(image)
    record = replace(record, side=min(image.size), colour=lost or None)
    return LoadedImage(record, pixels, converted=image.info.get("converted", ""))


def rejection_reason(made: dict[str, Tensor], row: int) -> str:
    """Return why a latent is not usable; empty if it is."""
    tensors = [made["latents"][row]]
    if "nulls" in made:
        tensors.append(made["nulls"][made["null_rows"][row]])
    if not all(tensor.isfinite().all() for tensor in tensors):
        return "its latent is NaN or infinite in float16; invert with dtype float32"
    if tensors[0].numel() > 1 and tensors[0].min() == tensors[0].max():
        return "its latent is constant"
    if "references" in made and not made["references"][row].isfinite().all():
        return "its reference is NaN or infinite in float16"
    if "errors" in made and not made["errors"][row].isfinite():
        return "its latent gives no image back; invert with dtype float32"
    return ""


def commit(part: ChunkPlan, made: dict[str, Tensor], images: list[LoadedImage]) -> ChunkRecord:
    """Write a chunk's files, and last its record, which is returned."""
    files, statistics = {}, Statistics()
    usable = [image for image in images if not image.reason]
    rows = [image.row for image in usable]
    if rows:
        latents = made["latents"][rows].contiguous()
        norms = latents.float().flatten(1).norm(dim=1)
        kinds = {"latents": {"latents": latents, "norms": norms}}
        if "errors" in made:
            kinds["latents"]["errors"] = made["errors"][rows].contiguous()
        for kind in ("clean", "references"):
            if kind in made:
                kinds[kind] = {kind: made[kind][rows].contiguous()}
        if "nulls" in made:
            owners, places = made["null_rows"][rows].unique(return_inverse=True)
            nulls = made["nulls"][owners].contiguous()
            kinds["nulls"] = {"nulls": nulls, "null_rows": places.contiguous()}
        for kind, tensors in kinds.items():
            content = save(tensors)
            write_bytes(file_of(part.stem, kind), content)
            files[kind] = FileRecord(len(content), sha256(content), sorted(tensors))
        statistics = Statistics(
            (norms.mean() / nominal_norm(latents[0].numel())).item(),
            latents.float().mean((0, 2, 3)).tolist(),
            made["errors"][rows].mean().item() if "errors" in made else None,
        )
    rejects = [
        Reject(image.record.id, image.record.bytes, image.record.sha256, image.reason, place)
        for place, image in enumerate(images)
        if image.reason
    ]
    records = [image.record for image in usable]
    facts = files, records, rejects, statistics, part.home, part.settings
    record = ChunkRecord(*facts, schema=ChunkRecord.SCHEMA)
    write(part.stem.with_suffix(".json"), record)
    return record
