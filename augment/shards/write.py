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
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.format import DIGITS
from augment.centroid.rule import Rule
from augment.core.errors import AugmentWarning, Damaged, Missing, UserError, first_few
from augment.core.files import JsonObject, check_folder, in_use, model_digest, sha256
from augment.core.registry import refuse_reserved
from augment.core.schema import as_object, build, write
from augment.diffusion import Backbone, load_backbone, parse_dtype
from augment.diffusion.backbone import Recipe
from augment.diffusion.checkpoints.licences import licence_of
from augment.diffusion.sampling import Sampling
from augment.diffusion.usage import Usage
from augment.jobs.job import planning_device, run
from augment.plan.plan import Plan
from augment.plan.planner import Planner, budget, round_robin, warn_of_copies
from augment.shards.dataset import Sample, Shards, encode, open_shards, write_shard
from augment.shards.format import (
    MAX_SHARDS,
    SCHEMA,
    SETTINGS,
    Output,
    ShardManifest,
    ShardSettings,
    read_settings,
    read_table,
    recover_settings,
    settings_digest,
    shard_path,
    write_info,
)
from augment.shards.verify import Tally, count_shards
from augment.sources.images import reduce
from augment.sources.prompts import class_prompts
from augment.synthesis.filters import Filter, make_filter
from augment.synthesis.refine import SeedSelect, check_sampling
from augment.synthesis.synthesizer import Synthesizer, planner_of, resolve

T = TypeVar("T", Sampling, Output)

MAX_CHECKED = 64
"""Contexts that are embedded before anything is written, the longest ones."""

SETTINGS_COPIES = 2
"""Shards whose records hold the settings too, should the file of these be lost."""


def write_shards(
    synthesizer: Synthesizer,
    planner: Planner,
    per_class: int | dict[str, int],
    out: str | Path,
    filters: dict[str, Filter] | None = None,
    **output: Any,
) -> Shards:
    """Write ``per_class`` synthetic images a class as shards; a job that was stopped resumes.

    Args:
        synthesizer: makes images of plans.
        planner: draws the plans.
        per_class: images a class; or how many of each class, by its name.
        out: the folder, made if needed.
        filters: what an image has to pass, by name.
        output: fields of `augment.shards.format.Output`.

    Raises:
        UserError: the folder holds the images of other settings, or another run is at work on it.
    """
    run(ShardJob(Path(out), synthesizer, planner, per_class, Output(**output), filters or {}))
    return open_shards(out)


@dataclass
class ShardJob:
    """The job of writing shards: an `augment.jobs.job.Job`.

    Args:
        path, synthesizer, planner, per_class: see `write_shards`.
        output: how images are written.
        filters: what an image has to pass, by name.
        where: device and dtype of the backbone, for workers that load it themselves.

    Raises:
        UserError: too many images, or classes are to be mixed.
    """

    path: Path
    synthesizer: Synthesizer
    planner: Planner
    per_class: int | dict[str, int]
    output: Output = Output()
    filters: dict[str, Filter] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    title: str = field(default="", init=False)
    recipe: Recipe = field(default_factory=dict, init=False)
    digest: str = field(default="", init=False)
    labels: list[int] = field(default_factory=list, init=False, repr=False)
    tally: Tally = field(default_factory=Tally, init=False, repr=False)
    manifest: ShardManifest | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, settings: ShardSettings) -> "ShardJob":
        """Open the bank and load the backbone that settings ask for; see `ShardSettings`.

        Raises:
            UserError: a setting is unknown, does not fit the bank, or asks for no image.
        """
        bank = LatentBank.open(settings.bank)
        planner, counts = planner_of(bank, settings), _image_counts(bank, settings)
        contexts = ("context",) if settings.contexts else ()
        prompts = None
        if settings.prompt:
            prompts = class_prompts(bank.classes, settings.prompt, keep=contexts)
        refine, filters = settings.refine, settings.filters or {}
        refine = SeedSelect(refine) if isinstance(refine, int) else refine
        if refine:  # what can be refused is refused before gigabytes are loaded
            check_sampling(resolve(bank, settings).steps)
        if isinstance(filters, str):
            filters = dict.fromkeys(filters.split(","))
        judges = {name: make_filter(name, **(given or {})) for name, given in filters.items()}
        options = settings.backbone_options or {}
        refuse_reserved(options, "name_or_path", "device", "dtype")
        recipe = bank.recipe_with(settings.backbone) | options
        where: dict[str, Any] = {"device": settings.device, "dtype": parse_dtype(settings.dtype)}
        device = planning_device(settings.device, settings.executor, settings.dry_run)
        here: dict[str, Any] = recipe | where | {"device": device}
        synthesizer = Synthesizer(
            load_backbone(**here),
            bank,
            Rule.parse(settings.rule),
            _part_of(settings, Sampling),
            prompts,
            refine,
            settings.images,
            reference_rule=settings.reference_rule,
        )
        output = _part_of(settings, Output)
        return cls(Path(settings.out), synthesizer, planner, counts, output, judges, where)

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is written."""
        check_folder(self.path)
        self.title = f"synthesize {self.synthesizer.rule}"
        self.recipe = self.synthesizer.backbone.recipe
        if self.planner.soft:
            raise UserError(
                f"expected images of one class each for shards, got classes = "
                f"{self.planner.classes} and translate = {self.planner.mixing.translate}; use "
                "SyntheticDataset, which gives soft labels"
            )
        self.labels = round_robin(self.per_class, list(self.planner.images))
        if self.total > MAX_SHARDS * self.output.shard_size:
            raise UserError(
                f"expected at most {MAX_SHARDS:,} shards, got {self.total:,} images in shards of "
                f"{self.output.shard_size}; make them larger"
            )
        self.filters = dict(sorted(self.filters.items()))  # so that scores have one order

    def chosen(self) -> str:
        """Return a line of prompts and guidance; empty for a family used without prompts."""
        made = self.synthesizer
        words = map(made.prompt, self.planner.images)
        some = next((text for text in words if isinstance(text, str) and text), "")
        if not some or made.backbone.usage == Usage():
            return ""
        return f"prompts such as {some!r}; guidance {made.resolved.guidance:g}"

    def __getstate__(self) -> dict[str, Any]:
        """Return what is sent to a worker elsewhere: not the backbone, where it can be loaded."""
        synthesizer = copy.copy(self.synthesizer)
        if self.recipe:
            synthesizer.backbone = None  # type: ignore[assignment]
        return {**self.__dict__, "synthesizer": synthesizer}

    @property
    def total(self) -> int:
        """The images of the whole job."""
        return len(self.labels)

    def indices(self, unit: int) -> range:
        """Return the indices of the images of a shard."""
        size = self.output.shard_size
        return range(unit * size, min((unit + 1) * size, self.total))

    def settings(self) -> ShardManifest:
        """Return all that the shards depend on."""
        made, mixing = self.synthesizer, self.planner.mixing
        nearest = _features_digest(self.planner)
        facts = {
            "schema": SCHEMA,
            "classes": list(self.planner.images),
            "shards": math.ceil(self.total / self.output.shard_size),
            "per_class": self.per_class,
            **vars(self.output),
            "rule": str(made.rule),
            **vars(made.resolved),
            "prompts": made.texts,
            **{key: getattr(mixing, key) for key in ("seed", "members", "noise")},
            "alpha": mixing.alpha_json,
            # else left out, as folders of older versions have it
            **({} if nearest is None else {"nearest": nearest}),
            **({} if mixing.levels is None else {"level": mixing.levels}),
            **_rule_of(made),
            **({"contexts": _contexts_digest(self.planner)} if self.planner.contexts else {}),
            **({"refine": contents(made.refine)} if made.refine else {}),
            "filters": {name: contents(f) for name, f in self.filters.items()},
            "images": self.origins(),
            "bank": made.bank.digest,
            "fingerprint": made.bank.fingerprint,
            "dtype": precision(made.backbone),
            **({"usage": as_object(usage)} if (usage := made.bank.manifest.usage) else {}),
            **({"licence": licence} if (licence := licence_of(made.bank.manifest.recipe)) else {}),
        }
        return build(ShardManifest, json.loads(json.dumps(facts)))

    def origins(self) -> dict[str, dict[str, str]]:
        """Return the real images of each class, and the first `DIGITS` digits of their SHA-256.

        By these no image that a classifier is tested on is ever one that it was trained with.
        """
        bank = self.synthesizer.bank
        digests = {name: bank.digests(name) for name in self.planner.images}
        images = self.planner.images.items()
        return {name: {i: digests[name][i][:DIGITS] for i in ids} for name, ids in images}

    def plan(self) -> list[int]:
        """Return the number of images of each shard; write the settings, or compare them."""
        settings, old = self.settings(), self._known()
        if old is not None:
            settings = replace(settings, schema=old.schema, licence=old.licence)
            if old != settings:
                names = (field.name for field in fields(settings))
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
            # before anything is written
            self.synthesizer.check([*plans, *longest(self.synthesizer, self.planner, plans)])
            write(self.path / SETTINGS, settings)
        if not self.synthesizer.bank.holds_clean:  # the noise of each image is its own
            warn_of_copies(self.planner, self.labels)
        self.digest = settings_digest(self.path)
        self.manifest = settings if settings.schema == SCHEMA else None
        return [len(self.indices(unit)) for unit in range(settings.shards)]

    def _known(self) -> ShardManifest | None:
        """Return the settings that are in the folder; lost ones are taken from the shards.

        Raises:
            UserError: they are damaged, and no shard has them.
        """
        try:
            return read_settings(self.path)
        except Missing:
            return recover_settings(self.path)
        except Damaged:
            if recovered := recover_settings(self.path):
                return recovered
            raise

    def committed(self, unit: int) -> int:
        """Return the bytes of a shard and its record; 0 if it is not finished, or is damaged."""
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
        reference = made.reference
        scorers = {name: f.prepare(reference) for name, f in self.filters.items()}
        return partial(self.work, scorers)

    def work(self, scorers: dict[str, Callable[..., Tensor]], unit: int) -> None:
        """Make and commit a shard."""
        pending, made = list(self.indices(unit)), {}
        dropped: dict[str, Counter[str]] = {name: Counter() for name in scorers}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for attempt in range(self.output.candidates):
                refused = []
                for plans in self._batches(attempt, pending):
                    images, losses = self.synthesizer.made(plans)
                    scores = score(scorers, images, [plan.label for plan in plans])
                    small = reduce(images, self.output.pixels).cpu()
                    for row, plan in enumerate(plans):
                        own = {name: values[row] for name, values in scores.items()}
                        bad = [n for n in own if _fails(self.filters[n], own[n])]
                        for name in bad:
                            dropped[name][plan.class_name] += 1
                        if bad:
                            refused.append(plan.index)
                            continue
                        data = pool.submit(
                            encode, small[row], self.output.extension, self.output.quality
                        )
                        loss = None if losses is None else [losses[row, 0], losses[row].min()]
                        made[plan.index] = (plan, own, loss, data)
                pending = refused
        samples = (self._sample(*made[index]) for index in sorted(made))
        write_shard(
            shard_path(self.path, unit),
            samples,
            self.output.extension,
            settings=self.digest,
            wanted=len(self.indices(unit)),
            dropped={name: dict(sorted(counts.items())) for name, counts in dropped.items()},
            synthesis=self.manifest if unit < SETTINGS_COPIES else None,
        )

    def _batches(self, attempt: int, indices: Sequence[int]) -> Any:
        size = self.synthesizer.resolved.batch_size
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
        """Return what the shard holds of an image; of a refined one, its loss before and after."""
        about = {
            "plan": plan.facts,
            **how(self.synthesizer, plan),
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
            lacking = first_few([f"{name!r} {words}" for name, words in self.lacking.items()])
            warnings.warn(
                f"expected {tally.wanted:,} different images, got {lacking}; allow "
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


def how(synthesizer: Synthesizer, plan: Plan) -> JsonObject:
    """Return the prompt, guidance and rule for references of a plan, where there are."""
    text, guidance = synthesizer.text(plan), synthesizer.resolved.guidance
    facts = {"prompt": text} if text else {}
    facts |= _rule_of(synthesizer)
    return facts if guidance == 1 else {**facts, "guidance": guidance}


def _rule_of(synthesizer: Synthesizer) -> dict[str, str]:
    """Return the rule for references, where the bank has any."""
    rule = synthesizer.reference_rule or "lin"
    return {"reference_rule": rule} if synthesizer.bank.holds_references else {}


def contents(judge: Filter | SeedSelect) -> JsonObject:
    """Return settings, a file or a folder of a model by its digest: shards depend on what it is."""
    settings = dict(vars(judge))
    for key, value in settings.items():
        if isinstance(value, str) and value:
            settings[key] = model_digest(value) or value
    return settings


def precision(backbone: Backbone) -> str:
    """Return the network's dtype, or default where the backbone takes it on its device anyway."""
    on_gpu = backbone.device.type == "cuda"
    usual = getattr(backbone, "half", torch.float32) if on_gpu else torch.float32
    dtype = getattr(backbone, "dtype", usual)
    return "default" if dtype == usual else str(dtype)


def score(
    scorers: dict[str, Callable[..., Tensor]], images: Tensor, labels: list[int]
) -> dict[str, list[float]]:
    """Return the scores of a batch by each filter."""
    return {name: scorer(images, labels).tolist() for name, scorer in scorers.items()}


def _fails(judge: Filter, value: float) -> bool:
    """Tell whether a score is below what a filter asks for; one that is not a number is."""
    return judge.minimum is not None and not value >= judge.minimum


def longest(synthesizer: Synthesizer, planner: Planner, plans: Sequence[Plan]) -> list[Plan]:
    """Return a plan of the class of the longest prompt with each of the longest contexts."""
    home = max(plans, key=lambda plan: len(synthesizer.text(plan)))
    return [replace(home, context=c) for c in sorted(planner.contexts, key=len)[-MAX_CHECKED:]]


def _contexts_digest(planner: Planner) -> str:
    """Return the SHA-256 of the contexts that are drawn."""
    return sha256(json.dumps(planner.contexts).encode())


def _features_digest(planner: Planner) -> str | None:
    """Return the SHA-256 of the features that neighbours are found by, if there are any."""
    if planner.features is None:
        return None
    rows = (planner.features[name].detach().cpu().double() for name in planner.images)
    return sha256("".join(sha256(part.numpy().tobytes()) for part in rows).encode())


def _image_counts(bank: LatentBank, settings: ShardSettings) -> int | dict[str, int]:
    """Return the number of images of every class, or of each that needs some.

    Raises:
        UserError: no class needs any.
    """
    fill_to, tail_only = settings.fill_to, settings.tail_only
    real = np.array([len(ids) for ids in bank.members.values()])
    counts = budget(real, settings.per_class, fill_to, None, tail_only).tolist()
    if not any(counts):
        raise UserError(
            f"expected a class that lacks images, got {min(real)} to {max(real)} real ones each; "
            "choose a larger --fill-to, --tail-only or --per-class"
        )
    if fill_to is None and tail_only is None:
        return settings.per_class
    return {name: count for name, count in zip(bank.members, counts, strict=True) if count}


def _part_of(settings: ShardSettings, kind: type[T]) -> T:
    """Return the part of the settings that one of their base classes holds."""
    return kind(**{f.name: getattr(settings, f.name) for f in fields(kind)})
