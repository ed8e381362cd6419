"""The pictures of a report: real, sampled back, centroids by rule, and synthetic ones.

Each class has one sprite, its tiles side by side as WebP, which the page decodes when it is looked
at. What the network has to make is made first, for some classes, in batches across them.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.format import read_original
from augment.centroid import Rule
from augment.core.errors import BiasWarning, ImageRejected, UserError
from augment.core.progress import Progress
from augment.diffusion.backbone import Backbone
from augment.diffusion.checkpoints.hub import offline
from augment.measure.health import ClassHealth
from augment.measure.reconstruction import psnr
from augment.plan.plan import Plan
from augment.report.provenance import Provenance
from augment.report.tiles import Tile, square
from augment.shards.dataset import decode
from augment.shards.write import score
from augment.sources import Source
from augment.sources.decoding import open_image
from augment.sources.images import to_pil
from augment.synthesis.filters import make_filter
from augment.synthesis.synthesizer import Synthesizer, Undoing

REAL, BACK, PLANS, KEPT, REFUSED = 16, 5, 2, 8, 4
"""Maximum numbers of a class: real images, images sampled back, centroids by each rule, and
synthetic images, kept and refused. Real ones that are not sampled back are inputs of the others."""

MAX_PIXELS = 5e7  # of all tiles: about 10 MB
MAX_SIDE, MIN_SIDE = 256, 48  # pixels of a tile


class Work(NamedTuple):
    """Plans of one kind to make images of."""

    kind: str
    synthesizer: Synthesizer
    plans: list[Plan]


@dataclass
class Gallery:
    """Makes the small pictures of a report, with what is known of each.

    Args:
        provenance: how images are, or were, made.
        backbone: makes images; without it there are only those on disk.
        rules: names of the rules of centroids.
        root: the real images, a folder or a source; by default where they were.
        side: pixels a side of a tile.

    Attributes:
        missing: number of real images that are no longer where they were.
        made: tiles that were made, by class.
        speed: number of images that were made, and the seconds that took.
    """

    provenance: Provenance
    backbone: Backbone | None
    rules: Sequence[str]
    root: Path | Source | None
    side: int = MAX_SIDE
    missing: int = field(default=0, init=False)
    made: dict[str, list[Tile]] = field(default_factory=dict, init=False)
    speed: tuple[int, float] = field(default=(0, 0.0), init=False)

    @property
    def bank(self) -> LatentBank:
        """The bank."""
        return self.provenance.bank

    def paint(self, classes: Sequence[ClassHealth]) -> None:
        """Make what the network has to make, for some classes; fills ``made`` and ``speed``.

        Raises:
            UserError: a rule does not fit a class, or a chunk of the bank is damaged.
        """
        work = list(self._work(classes))
        began, total = perf_counter(), sum(len(part.plans) for part in work)
        with Progress(total=total, desc="images", unit="image") as bar, warnings.catch_warnings():
            warnings.simplefilter("ignore", BiasWarning)  # the report shows it in a plot
            for kind, synthesizer, plans in work:
                scorers = self._scorers(synthesizer) if kind == "refused" else {}
                size = synthesizer.sampling.batch_size
                for start in range(0, len(plans), size):
                    batch = plans[start : start + size]
                    images = synthesizer.images(batch)
                    scores = score(scorers, images, [plan.label for plan in batch])
                    for row, (plan, image) in enumerate(zip(batch, images, strict=True)):
                        tile = Tile(kind, square(to_pil(image), self.side))
                        if kind == "back":
                            tile.id = plan.members[0]
                        else:
                            tile.plan, tile.rule = plan, str(synthesizer.rule)
                            tile.code = self.provenance.python(plan, tile.rule)
                            tile.prompt = synthesizer.text(plan)
                            tile.guidance = synthesizer.resolved.guidance
                        tile.scores = {name: values[row] for name, values in scores.items()}
                        self.made.setdefault(plan.class_name, []).append(tile)
                    bar.update(len(batch))
        self.speed = total, perf_counter() - began

    def _work(self, classes: Sequence[ClassHealth]) -> Iterator[Work]:
        """Yield what to make, kind by kind."""
        assert self.backbone is not None
        bank, folder, names = self.bank, self.provenance.folder, self.bank.classes
        labels = [names.index(c.name) for c in classes]
        alone = [
            Plan.equal(label, names[label], [image_id], row)
            for label in labels
            for row, image_id in enumerate(bank.members[names[label]][:BACK])
        ]
        sampling = self.provenance.sampling
        if not bank.holds_clean:  # nothing was inverted
            yield Work("back", Undoing(self.backbone, bank, sampling.batch_size), alone)
        draw, count = self.provenance.planner, len(names)
        plans = [draw(0, label + k * count, label) for label in labels for k in range(PLANS)]
        prompts = folder.manifest.prompts if folder else None
        mixed = folder.manifest.reference_rule if folder else None
        for rule in self.rules:
            made = Synthesizer(
                self.backbone, bank, Rule.parse(rule), sampling, prompts, reference_rule=mixed
            )
            yield Work("rule", made, plans)
        if folder is None or folder.manifest.refine:  # these would take five times as long to make
            return
        found = [islice(self.provenance.rejected(c.name), REFUSED) for c in classes]
        refused = [plan for some in found for plan in some]
        if refused:
            rule = Rule.parse(folder.manifest.rule or "")
            made = Synthesizer(
                self.backbone, bank, rule, sampling, prompts, source=self.root, reference_rule=mixed
            )
            yield Work("refused", made, refused)

    def _scorers(self, synthesizer: Synthesizer) -> dict[str, Callable[..., Tensor]]:
        """Return the filters of the shards, as far as they are at hand."""
        backbone, reference = synthesizer.backbone, synthesizer.reference
        folder = self.provenance.folder
        found: dict[str, Callable[..., Tensor]] = {}
        side = backbone.resolution
        for name, settings in (folder.manifest.filters if folder else {}).items():
            try:
                with offline():  # the shards may come from a stranger
                    scores = make_filter(name, **settings).prepare(reference)
                # some look at real images only now
                scores(torch.zeros(1, backbone.channels, side, side), [0])
                found[name] = scores
            except UserError as error:
                Progress.write(f"without scores of {name} for what it refused: {error}")
        return found

    def tiles(self, health: ClassHealth) -> list[Tile]:
        """Return all tiles of a class, in the order of the page."""
        made, real = self.made.get(health.name, []), list(self._real(health.name))
        errors = dict(zip(self.bank.members[health.name], health.errors or (), strict=False))
        for tile in (*real, *made):
            if tile.id in errors:
                tile.psnr = psnr(errors[tile.id])
        early = [tile for tile in made if tile.kind != "refused"]
        late = [tile for tile in made if tile.kind == "refused"]
        return [*real, *early, *self._kept(health.name), *late]

    def _real(self, name: str) -> Iterator[Tile]:
        """Yield the first real images of a class; those that are gone are counted."""
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
            yield Tile("real", square(picture, self.side), id=image_id)

    def _kept(self, name: str) -> Iterator[Tile]:
        """Yield the first synthetic images of a class."""
        folder = self.provenance.folder
        for row in folder.rows(name)[:KEPT] if folder else []:
            shards = folder.shards  # type: ignore[union-attr]
            about = shards.about(row)
            plan, rule, scores = shards.plan(row), str(about.get("rule", "")), about.get("scores")
            guidance = about.get("guidance")
            yield Tile(
                "kept",
                square(to_pil(decode(shards.read(row), shards.extension)), self.side),
                plan=plan,
                rule=rule,
                row=row,
                code=self.provenance.python(plan, rule, row),
                scores=scores if isinstance(scores, dict) else {},
                refined=about.get("refined") or (),
                prompt=str(about.get("prompt", "")),
                guidance=guidance if isinstance(guidance, (int, float)) else 1.0,
            )


def side_of(
    bank: LatentBank, backbone: Backbone | None, classes: int, painted: int, rules: int
) -> int:
    """Return the pixels a side of tiles, a multiple of 16: as images have, or `MAX_PIXELS` allow.

    Args:
        bank: the bank.
        backbone: the backbone, if it makes images.
        classes: number of classes.
        painted: number of classes that images are made of.
        rules: number of rules.
    """
    records = (c.record for chunks in bank.chunks.values() for c in chunks)
    sides = [image.side for record in records for image in record.images]
    largest = backbone.resolution if backbone else max(sides)
    real = sum(min(len(ids), REAL) for ids in bank.members.values())
    count = real + classes * KEPT + painted * (BACK + PLANS * rules + REFUSED)
    allowed = (MAX_PIXELS / count) ** 0.5 // 16 * 16
    return int(min(-(-largest // 16) * 16, max(allowed, MIN_SIDE), MAX_SIDE))
