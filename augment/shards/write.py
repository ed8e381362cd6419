"""From a bank to shards: the job that writes synthetic images.

Its units are the shards. Image i of the job is the planner's (0, i); classes take turns, so that
shards are balanced. Filters may refuse it; then the planner's (1, i) is tried, and so on, as often
as is allowed, before the image is given up and counted. So a shard is a pure function of the job's
settings and the shard's number: anybody may make or remake any.
"""

import copy
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from augment.bank.format import DIGITS
from augment.core.errors import AugmentWarning, Damaged, Missing, UserError, first_few, lookup
from augment.core.files import check_folder, in_use, model_digest, sha256
from augment.core.schema import build, write
from augment.diffusion import load_backbone
from augment.jobs.job import run
from augment.plan.plan import Plan
from augment.plan.planner import Planner, round_robin, warn_of_copies
from augment.shards.dataset import Sample, Shards, encode, open_shards, write_shard
from augment.shards.format import (
    FORMATS,
    MOST_SHARDS,
    SCHEMA,
    SETTINGS,
    ShardSettings,
    read_settings,
    read_table,
    recover_settings,
    settings_digest,
    shard_path,
    write_info,
)
from augment.shards.verify import Tally, count_shards
from augment.synthesis.filters import Filter, Reference
from augment.synthesis.refine import SeedSelect
from augment.synthesis.synthesizer import Synthesizer

SETTINGS_COPIES = 2
"""Shards whose records hold the settings too, should the file of these be lost."""


def write_shards(
    synthesizer: Synthesizer,
    planner: Planner,
    per_class: int | dict[str, int],
    out: str | Path,
    **options: Any,
) -> Shards:
    """Write ``per_class`` synthetic images a class as shards; a job that was stopped goes on.

    Args:
        synthesizer: makes images of plans.
        planner: throws the dice.
        per_class: images a class; or how many of each class, by its name.
        out: the folder, made if needed.
        options: others of `Synthesis`.

    Raises:
        UserError: the folder holds the images of other settings, or another run is at work on it.
    """
    run(Synthesis(Path(out), synthesizer, planner, per_class, **options))
    return open_shards(out)


@dataclass
class Synthesis:
    """The job of writing shards: an `augment.jobs.job.Job`.

    Args:
        path, synthesizer, planner, per_class: see `write_shards`.
        shard_size: images a shard.
        extension: ``jpg``, ``webp`` or ``png``.
        quality: of the first two, 1 to 100.
        pixels: larger images are reduced to so many a side; classifiers that see 224 need no more.
        filters: what an image has to pass, by name.
        candidates: how many plans are tried for an image before it is given up.
        where: device and dtype of the backbone, for workers that load it themselves.

    Raises:
        UserError: a setting is out of its range, or classes are to be mixed.
    """

    path: Path
    synthesizer: Synthesizer
    planner: Planner
    per_class: int | dict[str, int]
    shard_size: int = 1000
    extension: str = "jpg"
    quality: int = 95
    pixels: int = 256
    filters: dict[str, Filter] = field(default_factory=dict)
    candidates: int = 1
    where: dict[str, Any] = field(default_factory=dict)
    title: str = field(default="", init=False)
    recipe: dict[str, Any] = field(default_factory=dict, init=False)
    digest: str = field(default="", init=False)
    labels: list[int] = field(default_factory=list, init=False, repr=False)
    tally: Tally = field(default_factory=Tally, init=False, repr=False)
    known: ShardSettings | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is written."""
        check_folder(self.path)
        self.title = f"synthesize {self.synthesizer.rule}"
        self.recipe = self.synthesizer.backbone.recipe
        if self.planner.classes > 1:
            raise UserError(
                f"expected images of one class each for shards, got classes = "
                f"{self.planner.classes}; use SyntheticDataset, which gives soft labels"
            )
        for name in ("shard_size", "candidates", "pixels"):
            if getattr(self, name) < 1:
                raise UserError(f"expected {name} ≥ 1, got {getattr(self, name)}")
        self.labels = round_robin(self.per_class, list(self.planner.images))
        if not 1 <= self.quality <= 100:
            raise UserError(f"expected a quality from 1 to 100, got {self.quality}; 95 is usual")
        lookup(FORMATS, self.extension, "image format")
        if self.total > MOST_SHARDS * self.shard_size:
            raise UserError(
                f"expected at most {MOST_SHARDS:,} shards, got {self.total:,} images in shards of "
                f"{self.shard_size}; make them larger"
            )
        self.filters = dict(sorted(self.filters.items()))  # so that scores have one order

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to a worker elsewhere: how to load the backbone, where that is known."""
        synthesizer = copy.copy(self.synthesizer)
        if self.recipe:
            synthesizer.backbone = None  # type: ignore[assignment]
        return {**self.__dict__, "synthesizer": synthesizer}

    @property
    def total(self) -> int:
        """The images of the whole job."""
        return len(self.labels)

    def indices(self, unit: int) -> range:
        """The images of a shard."""
        return range(unit * self.shard_size, min((unit + 1) * self.shard_size, self.total))

    def settings(self) -> ShardSettings:
        """Return all that the shards depend on."""
        made, dice = self.synthesizer, self.planner
        facts = {
            "schema": SCHEMA,
            "classes": list(dice.images),
            "shards": math.ceil(self.total / self.shard_size),
            **{key: getattr(self, key) for key in ("per_class", "shard_size", "extension")},
            **{key: getattr(self, key) for key in ("quality", "pixels", "candidates")},
            "rule": str(made.rule),
            **{key: getattr(made, key) for key in ("solver", "steps", "guidance", "batch_size")},
            "interval": list(made.interval),
            "prompts": made.prompts or {},
            **{key: getattr(dice, key) for key in ("seed", "members", "noise")},
            **choice(dice),
            # else left out, as folders of older versions have it
            **({"refine": contents(made.refine)} if made.refine else {}),
            "filters": {name: contents(f) for name, f in self.filters.items()},
            "images": self.origins(),
            "bank": made.bank.digest,
            "fingerprint": made.bank.fingerprint,
            "dtype": precision(made.backbone),
        }
        return build(ShardSettings, json.loads(json.dumps(facts)))

    def origins(self) -> dict[str, dict[str, str]]:
        """The real images of each class, and the first `DIGITS` digits of their SHA-256.

        By these no image that a classifier is tested on is ever one that it was trained with.
        """
        bank = self.synthesizer.bank
        known = {name: bank.digests(name) for name in self.planner.images}
        return {
            name: {i: known[name][i][:DIGITS] for i in ids}
            for name, ids in self.planner.images.items()
        }

    def plan(self) -> list[int]:
        """The images of each shard; the settings are written, or compared."""
        settings, old = self.settings(), self._known()
        if old is not None:
            settings = replace(settings, schema=old.schema)
            if old != settings:
                names = [known.name for known in fields(settings)]
                other = next(n for n in names if getattr(old, n) != getattr(settings, n))
                raise UserError(
                    f"expected {self.path} to be new or of the same settings, got images of "
                    f"others ({other}); use a new folder"
                )
        else:
            if in_use(self.path) and not (self.path / SETTINGS).exists():  # by another rank since
                raise UserError(
                    f"expected {self.path} to be new or empty, got a folder in use; use a new one"
                )
            first = range(min(self.total, len(self.planner.images)))
            plans = [self.planner(0, index, self.labels[index]) for index in first]
            self.synthesizer.check(plans)  # before anything is written
            write(self.path / SETTINGS, settings)
        warn_of_copies(self.planner, self.labels)
        self.digest = settings_digest(self.path)
        self.known = settings if settings.schema == SCHEMA else None
        return [len(self.indices(unit)) for unit in range(settings.shards)]

    def _known(self) -> ShardSettings | None:
        """Return the settings that are in the folder; lost ones are taken from the shards.

        Raises:
            UserError: they are damaged, and no shard has them.
        """
        try:
            return read_settings(self.path)
        except Missing:
            return recover_settings(self.path)
        except Damaged:
            if known := recover_settings(self.path):
                return known
            raise

    def committed(self, unit: int) -> int:
        """The bytes of a shard and its record; 0 if it is not finished, or was harmed since."""
        path = shard_path(self.path, unit)
        if not path.with_suffix(".json").exists():
            return 0
        try:
            record, _ = read_table(path, len(self.planner.images))
        except Damaged:
            return 0
        if record.settings != self.digest:
            return 0  # of another job
        return record.bytes + path.with_suffix(".json").stat().st_size

    def start(self) -> Callable[[int], None]:
        """Load the backbone, unless it is here, and what the filters need."""
        made = self.synthesizer
        if made.backbone is None:
            made.backbone = load_backbone(**self.recipe, **self.where)
        reference = Reference(
            classes=made.bank.classes,
            prompts=[made.bank.prompt(name) for name in made.bank.classes],
            real=lambda label: made.real(made.bank.classes[label]),
            device=made.backbone.device,
            counts=[len(ids) for ids in made.bank.members.values()],
        )
        scorers = {name: f.prepare(reference) for name, f in self.filters.items()}
        return partial(self.work, scorers)

    def work(self, scorers: dict[str, Callable[..., Tensor]], unit: int) -> None:
        """Make and commit a shard."""
        pending, made = list(self.indices(unit)), {}
        dropped: dict[str, Counter[str]] = {name: Counter() for name in scorers}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for attempt in range(self.candidates):
                refused = []
                for plans in self._batches(attempt, pending):
                    images, losses = self.synthesizer.made(plans)
                    scores = score(scorers, images, [plan.label for plan in plans])
                    small = reduce(images, self.pixels).cpu()
                    for row, plan in enumerate(plans):
                        mine = {name: values[row] for name, values in scores.items()}
                        bad = [n for n in mine if fails(self.filters[n], mine[n])]
                        for name in bad:
                            dropped[name][plan.class_name] += 1
                        if bad:
                            refused.append(plan.index)
                            continue
                        data = pool.submit(encode, small[row], self.extension, self.quality)
                        loss = None if losses is None else [losses[row, 0], losses[row].min()]
                        made[plan.index] = (plan, mine, loss, data)
                pending = refused
        samples = (self._sample(*made[index]) for index in sorted(made))
        write_shard(
            shard_path(self.path, unit),
            samples,
            self.extension,
            settings=self.digest,
            wanted=len(self.indices(unit)),
            dropped={name: dict(sorted(counts.items())) for name, counts in dropped.items()},
            synthesis=self.known if unit < SETTINGS_COPIES else None,
        )

    def _batches(self, attempt: int, indices: Sequence[int]) -> Any:
        size = self.synthesizer.batch_size
        for first in range(0, len(indices), size):
            batch = indices[first : first + size]
            yield [self.planner(attempt, index, self.labels[index]) for index in batch]

    def _sample(
        self,
        plan: Plan,
        scores: dict[str, float],
        loss: list[Tensor] | None,
        data: "Future[bytes]",
    ) -> Sample:
        """What the shard holds of an image; of a refined one, its loss before and after."""
        about = {
            "plan": asdict(plan),
            "rule": str(self.synthesizer.rule),
            "backbone": self.synthesizer.bank.fingerprint["backbone"],
            "scores": {k: v if math.isfinite(v) else None for k, v in scores.items()},
            **({"refined": [round(value.item(), 6) for value in loss]} if loss else {}),
        }
        return Sample(plan.index, data.result(), plan.label, about)

    def finish(self) -> None:
        """Compare what there is with what was asked for, and write the file that timm reads.

        Raises:
            UserError: there is not one image.
        """
        self.tally = tally = count_shards(self.path)
        write_info(self.path, tally.lengths)
        refused = sum(counts.total() for counts in tally.refused.values())
        if not tally.written:
            raise UserError(
                f"expected {tally.wanted:,} synthetic images in {self.path}, got none: filters "
                f"refused {refused:,} candidates; use other filters or lower minimums, in a new "
                "folder"
            )
        if self.lacking:
            found = first_few([f"{name!r} {words}" for name, words in self.lacking.items()])
            warnings.warn(
                f"expected {tally.wanted:,} different images, got {found}; allow "
                "more --candidates where filters refused images, and add real images, noise or a "
                "larger alpha where images are copies",
                AugmentWarning,
                stacklevel=2,
            )

    @property
    def lacking(self) -> dict[str, str]:
        """What is wrong with the images of a class, where they are fewer than asked for or copies.

        Copies are less than half as many different files as images.
        """
        names, asked = list(self.planner.images), Counter(self.labels)
        lacking = {}
        for label, (name, (count, different)) in enumerate(self.tally.by_class(names).items()):
            if count < asked[label]:
                lacking[name] = f"{count} of {asked[label]}"
            elif 2 * different < count and different:
                lacking[name] = f"{count}, of which {different} differ"
        return lacking


def contents(judge: Filter | SeedSelect) -> dict[str, Any]:
    """Return settings, a file or a folder of a model by its digest: shards depend on what it is."""
    settings = asdict(judge)  # type: ignore[call-overload]
    for key, value in settings.items():
        if isinstance(value, str) and value:
            settings[key] = model_digest(value) or value
    return settings


def precision(backbone: Any) -> str:
    """The network's dtype, if it is not what the backbone takes on its device by default."""
    on_gpu = backbone.device.type == "cuda"
    usual = getattr(backbone, "half", torch.float32) if on_gpu else torch.float32
    dtype = getattr(backbone, "dtype", usual)
    return "default" if dtype == usual else str(dtype)


def score(
    scorers: dict[str, Callable[..., Tensor]], images: Tensor, labels: list[int]
) -> dict[str, list[float]]:
    """The scores of a batch by each filter."""
    return {name: scorer(images, labels).tolist() for name, scorer in scorers.items()}


def fails(judge: Filter, value: float) -> bool:
    """Whether a score is below what a filter asks for; one that is not a number is."""
    return judge.minimum is not None and not value >= judge.minimum


def reduce(images: Float[Tensor, "n c h w"], pixels: int) -> Float[Tensor, "n c r r"]:
    """Images of at most so many pixels a side."""
    if images.shape[-1] <= pixels:
        return images
    return F.interpolate(images, (pixels, pixels), mode="bilinear", antialias=True).clamp(0, 1)


def choice(planner: Planner) -> dict[str, Any]:
    """The planner's alpha as strict JSON has it, and the features' digest if it goes by them."""
    alpha = planner.alpha
    if isinstance(alpha, Sequence):
        alpha = list(alpha)
    record: dict[str, Any] = {"alpha": "inf" if alpha == math.inf else alpha}
    if planner.features is not None:  # else left out, as folders of older versions have it
        rows = (planner.features[name].detach().cpu().double() for name in planner.images)
        digests = [sha256(part.numpy().tobytes()) for part in rows]
        record["nearest"] = sha256("".join(digests).encode())
    return record
