"""The pictures of a report: real, sampled back, centroids by rule, and synthetic ones.

Each class has one sprite, its tiles side by side as WebP, which the page decodes when it is looked
at. What the network has to make is made first, for some classes, in batches across them.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from augment.bank.bank import LatentBank
from augment.bank.format import read_original
from augment.centroid.rule import Rule
from augment.core.errors import BiasWarning, ImageRejected, UserError
from augment.diffusion.backbone import Backbone
from augment.diffusion.checkpoints.hub import offline
from augment.diffusion.sampling import Sampling
from augment.measure.health import ClassHealth
from augment.measure.reconstruction import psnr
from augment.plan.plan import Plan
from augment.report.again import SAMPLING, Making, throws
from augment.report.tiles import Tile, rounded, square, told
from augment.shards.dataset import decode
from augment.shards.write import score
from augment.sources import Source
from augment.sources.decoding import open_image
from augment.sources.images import to_pil
from augment.synthesis.filters import Reference, make_filter
from augment.synthesis.synthesizer import Synthesizer

REAL, BACK, PLANS, KEPT, REFUSED = 16, 5, 2, 8, 4
"""Of a class at most: real images, images sampled back, centroids by each rule, and synthetic
images, kept and refused. Real ones that are not sampled back are seen as inputs of the others."""

PIXELS = 5e7  # of all tiles: about 10 MB
LARGEST = 256  # pixels a side


@dataclass
class Gallery:
    """Makes tiles.

    Args:
        making: how images are, or were, made.
        backbone: makes images; without it there are only those on disk.
        rules: of centroids.
        root: the real images, a folder or a source; by default where they were.
        side: pixels of a tile.
    """

    making: Making
    backbone: Backbone | None
    rules: Sequence[str]
    root: Path | Source | None
    side: int = LARGEST
    missing: int = field(default=0, init=False)
    made: dict[str, list[Tile]] = field(default_factory=dict, init=False)
    speed: tuple[int, float] = field(default=(0, 0.0), init=False)

    @property
    def bank(self) -> LatentBank:
        """The bank."""
        return self.making.bank

    def paint(self, classes: Sequence[ClassHealth]) -> None:
        """Make what the network has to make, for some classes: ``made``.

        ``speed`` is how many images that were, and in how many seconds.

        Raises:
            UserError: a rule does not fit a class, or a chunk of the bank is damaged.
        """
        assert self.backbone is not None
        jobs = list(self._jobs(classes))
        began, count = perf_counter(), 0
        with (
            tqdm(total=sum(len(plans) for _, _, plans in jobs), desc="images", unit="image") as bar,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", BiasWarning)  # the report tells it, with a plot
            for kind, synthesizer, plans in jobs:
                scorers = self._scorers(synthesizer) if kind == "refused" else {}
                for batch in batches(plans, synthesizer.resolved.batch_size):
                    images = synthesizer.images(batch)
                    scores = score(scorers, images, [plan.label for plan in batch])
                    for row, (plan, image) in enumerate(zip(batch, images, strict=True)):
                        mine = {name: values[row] for name, values in scores.items()}
                        tile = self.tile(to_pil(image), kind, self._about(kind, synthesizer, plan))
                        if mine:
                            tile.about["scores"] = rounded(mine)
                        self.made.setdefault(plan.class_name, []).append(tile)
                    bar.update(len(batch))
                    count += len(batch)
        self.speed = count, perf_counter() - began

    def _jobs(self, classes: Sequence[ClassHealth]) -> "list[tuple[str, Synthesizer, list[Plan]]]":
        """What to make: of each kind, by whom, and the plans."""
        bank, dice, names = self.bank, self.making.planner, self.bank.classes
        sampling, prompts = self.making.sampling, self.making.settings.prompts
        assert self.backbone is not None
        size = Sampling(batch_size=sampling.batch_size)
        exact = Synthesizer(self.backbone, bank, Rule.parse("lin/0"), size)
        labels = [names.index(c.name) for c in classes]
        alone = [
            Plan.equal(label, names[label], [image_id], row)
            for label in labels
            for row, image_id in enumerate(bank.members[names[label]][:BACK])
        ]
        jobs = [("back", exact, alone)]
        plans = [dice(0, label + k * len(names), label) for label in labels for k in range(PLANS)]
        for rule in self.rules:
            made = Synthesizer(self.backbone, bank, Rule.parse(rule), sampling, prompts)
            jobs.append(("rule", made, plans))
        refused = [plan for c in classes for plan in islice(self._refused(c.name), REFUSED)]
        if refused and (rule := self.making.settings.rule):
            jobs.append(("refused", replace(jobs[1][1], rule=Rule.parse(rule)), refused))
        return jobs

    def _refused(self, name: str) -> Any:
        """Plans of refused candidates; refined ones would take five times as long to make."""
        refined = self.making.settings.refine
        return iter(()) if refined else self.making.refused(name, self.making.rows(name))

    def _scorers(self, synthesizer: Synthesizer) -> dict[str, Any]:
        """The filters of the shards, as far as they are at hand."""
        bank, found = self.bank, {}
        reference = Reference(
            classes=bank.classes,
            prompts=[bank.prompt(name) for name in bank.classes],
            real=lambda label: replace(synthesizer, source=self.root).real(bank.classes[label]),
            device=synthesizer.backbone.device,
            counts=[len(ids) for ids in bank.members.values()],
        )
        for name, settings in self.making.settings.filters.items():
            try:
                with offline():  # the shards may come from a stranger
                    scores = make_filter(name, **settings).prepare(reference)
                scores(torch.zeros(1, *self._shape()), [0])  # some look at real images only now
                found[name] = scores
            except UserError as error:
                tqdm.write(f"without scores of {name} for what it refused: {error}")
        return found

    def _shape(self) -> tuple[int, int, int]:
        """Of the backbone's images."""
        assert self.backbone is not None
        return self.backbone.channels, self.backbone.resolution, self.backbone.resolution

    def _about(self, kind: str, synthesizer: Synthesizer, plan: Plan) -> dict[str, Any]:
        """What is told of an image that was made here."""
        if kind == "back":
            return {"id": plan.members[0]}
        return {"rule": str(synthesizer.rule), **told(plan)}

    def tiles(self, health: ClassHealth) -> list[Tile]:
        """All of a class, in the order of the page."""
        made = self.made.get(health.name, [])
        real = list(self._real(health.name))
        known = self.bank.members[health.name]
        errors = dict(zip(known, health.errors or (), strict=False))
        for tile in (*real, *made):
            if tile.kind in ("real", "back") and tile.about["id"] in errors:
                tile.about["psnr"] = round(psnr(errors[tile.about["id"]]), 1)
        early = [tile for tile in made if tile.kind != "refused"]
        late = [tile for tile in made if tile.kind == "refused"]
        return [*real, *early, *self._kept(health.name), *late]

    def _real(self, name: str) -> Any:
        """The first real images of a class; those that are gone are counted as ``missing``."""
        root = Path(self.bank.manifest.source) if self.root is None else self.root
        digests = self.bank.digests(name)
        for image_id in self.bank.members[name][:REAL]:
            try:
                content = read_original(root, image_id, digests[image_id])
                picture = open_image(content, self.bank.background)
            except ImageRejected:
                self.missing += 1
                continue
            if self.backbone is not None:
                picture = picture.convert("L" if self.backbone.channels == 1 else "RGB")
            yield self.tile(picture, "real", {"id": image_id})

    def _kept(self, name: str) -> Any:
        """The first synthetic images of a class."""
        for row in self.making.rows(name)[:KEPT]:
            shards = self.making.shards
            assert shards is not None
            about, plan = shards.about(row), shards.plan(row)
            more = {"rule": str(about.get("rule", "")), "row": row, **told(plan)}
            more["planned"] = self.making.planned and throws(self.making.planner, plan)
            if not self.making.job:
                more |= {key: about.get(key) for key in SAMPLING}
            if isinstance(about.get("scores"), dict):
                more["scores"] = rounded(about["scores"])
            if about.get("refined"):
                more["refined"] = about["refined"]
            yield self.tile(to_pil(decode(shards.read(row), shards.extension)), "kept", more)

    def tile(self, picture: Image.Image, kind: str, about: dict[str, Any]) -> Tile:
        """A tile of a picture."""
        return Tile(kind, square(picture, self.side), about)


def batches(plans: Sequence[Plan], size: int) -> Any:
    """Plans, so many at a time."""
    for first in range(0, len(plans), size):
        yield plans[first : first + size]


def side_of(
    bank: LatentBank, backbone: Backbone | None, classes: int, painted: int, rules: int
) -> int:
    """Pixels a side of tiles, a multiple of 16: as many as images have, or `PIXELS` allow."""
    records = (c.record for chunks in bank.chunks.values() for c in chunks)
    sides = [image.side for record in records for image in record.images]
    most = backbone.resolution if backbone else max(sides)
    real = sum(min(len(ids), REAL) for ids in bank.members.values())
    count = real + classes * KEPT + painted * (BACK + PLANS * rules + REFUSED)
    allowed = (PIXELS / count) ** 0.5 // 16 * 16
    wanted = -(-most // 16) * 16
    return int(min(wanted, max(allowed, 48), LARGEST))
