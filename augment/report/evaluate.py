"""Evaluate the health of a bank, or the quality of synthetic images: tables, a record and a plot.

A bank is measured by its latents alone (`augment.measure.health`); images by a frozen network's
features against those of real images (`augment.measure.features`). Intervals are 95 %: of means by
their standard error, of FID and KID by the bootstrap.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.core.errors import UserError, first_few
from augment.core.files import JsonObject, check_folder, write_bytes, write_json, write_table
from augment.core.progress import Progress
from augment.diffusion import Backbone
from augment.measure.bias import predicted_bias
from augment.measure.features import (
    check,
    class_distance,
    deviation,
    diversity,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    nearest_of_class,
    precision_recall,
)
from augment.measure.health import ClassHealth, Finding, findings
from augment.measure.latents import norm_law
from augment.measure.reconstruction import MIN_LPIPS_SIDE, load_lpips, reconstruction
from augment.networks import BATCH, Network
from augment.plan.plan import Plan
from augment.shards.dataset import Shards
from augment.sources import Source
from augment.sources.images import prepare
from augment.synthesis.synthesizer import Undoing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, str | float]
"""Cells by the titles of their columns."""
Form = tuple[int, int]
"""Number of channels, and pixels a side."""
Compare = Callable[[Tensor, Tensor], Tensor]

COPY_THRESHOLD = 0.4  # a nearest distance below which an image counts as a copy of another
RECONSTRUCTED = 16  # images a class
NEAREST = 5  # neighbour of precision and recall
BLUE, RED = "#0072b2", "#d55e00"
MAX_BARS, MAX_NAME = 25, 28  # classes in a plot, letters of their names: more would overlap


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation; its text is Markdown.

    Args:
        title: one line.
        overall: a row a measure.
        classes: a row a class.
        draw: draws a figure of it into a matplotlib figure.
        findings: sentences on the health of a bank.
        sampled: prompt, guidance and level of the first synthetic image, where there are any.
    """

    title: str
    overall: list[Row]
    classes: list[Row]
    draw: Callable[[Any], None]
    findings: list[Finding] = field(default_factory=list)
    sampled: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.title, *map(str, self.findings)]
        return "\n".join([*lines, "", *markdown(self.overall), "", *markdown(self.classes)])

    def record(self) -> JsonObject:
        """Return the tables for JSON, which has no NaN."""
        tables = {"overall": self.overall, "classes": self.classes}
        sampled = {"sampled": self.sampled} if self.sampled else {}
        return {"title": self.title, **sampled} | {
            name: [{k: None if _is_nan(v) else v for k, v in row.items()} for row in rows]
            for name, rows in tables.items()
        }

    def write(self, folder: str | Path) -> None:
        """Write ``evaluation.json``, ``classes.csv`` and ``evaluation.png``.

        Raises:
            UserError: the folder cannot be written to.
        """
        from matplotlib.figure import Figure

        root = Path(folder)
        check_folder(root)
        figure, content = Figure(figsize=(11, 4), layout="constrained"), io.BytesIO()
        self.draw(figure)
        figure.savefig(content, format="png", dpi=110)
        write_json(root / "evaluation.json", self.record())
        columns = list(self.classes[0])
        write_table(root / "classes.csv", [columns, *(list(row.values()) for row in self.classes)])
        write_bytes(root / "evaluation.png", content.getvalue())


def markdown(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yield the lines of a table of rows with the same keys."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, line in enumerate(cells):
        yield "| " + " | ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)) + " |"
        if not number:
            yield "|" + "|".join("-" * (w + 2) for w in widths) + "|"


def _cell(value: object) -> str:
    if value is None or _is_nan(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def evaluate_bank(
    bank: LatentBank, backbone: Backbone | None = None, real: Source | None = None
) -> Evaluation:
    """Measure whether the latents of a bank are the white noise that rules take them for.

    The columns are those of `augment.measure.health.ClassHealth.row`; with a backbone and real
    images also the error of images sampled back, and of the codec alone.

    Args:
        bank: the bank.
        backbone: the model that it was made with; samples some images of each class back.
        real: the images that it was made of.

    Raises:
        BankMismatch: the bank is of another backbone.
        UserError: a class has none of the bank's images.
    """
    health = [bank.health(c) for c in Progress(bank.classes, "classes", unit="class", delay=2)]
    rows: list[Row] = [c.row() for c in health]
    if backbone is not None and real is not None:
        lpips = lpips_for(backbone)
        for row, name in zip(rows, bank.classes, strict=True):
            row |= _reconstruct(bank, backbone, real, name, lpips)
    overall: list[Row] = []
    for title in list(rows[0])[2:]:
        values = [float(row[title]) for row in rows]
        mean = sum(values) / len(values)
        overall.append({"measure": title, "mean": mean, "least": min(values), "most": max(values)})
    title = f"bank {bank.path}: {sum(c.statistics.count for c in health)} latents"
    found = findings(health, *bank.made_by)
    return Evaluation(title, overall, rows, lambda figure: _draw_bank(figure, health), found)


def lpips_for(backbone: Backbone) -> Compare | None:
    """Load LPIPS if it can compare a backbone's images; print why if its weights are missing."""
    if backbone.resolution < MIN_LPIPS_SIDE:
        return None
    try:
        return load_lpips()
    except UserError as error:
        Progress.write(f"without LPIPS: {error}")
        return None


def _reconstruct(
    bank: LatentBank, backbone: Backbone, real: Source, name: str, lpips: Compare | None
) -> Row:
    """Compare images of a class with what its latents, and the codec alone, give back."""
    known = set(real.ids.get(name, ()))
    ids = [i for i in bank.members[name] if i in known][:RECONSTRUCTED]
    if not ids:
        raise UserError(
            f"expected the images that bank {bank.path} was made of, got none of class {name!r}; "
            "give the folder or source that was inverted"
        )
    label = bank.classes.index(name)
    plans = [Plan.equal(label, name, [i], k) for k, i in enumerate(ids)]
    images = torch.stack([real.load(i, backbone.channels, backbone.resolution) for i in ids])
    made = {
        "back": Undoing(backbone, bank).images(plans).cpu(),
        "codec": backbone.decode(backbone.encode(images)).cpu(),
    }
    errors = {way: reconstruction(images, others) for way, others in made.items()}
    row: Row = {
        f"{way} {measure.upper()}": errors[way][measure].mean().item()
        for measure in ("mse", "psnr", "ssim")
        for way in made
    }
    if lpips is not None:
        row |= {f"{way} LPIPS": lpips(images, x).mean().item() for way, x in made.items()}
    return row


def _draw_bank(figure: "Figure", health: Sequence[ClassHealth]) -> None:
    """Draw norms against the chi law, and what ``fix/0`` makes of the bias of each class."""
    left, right = figure.subplots(1, 2)
    norms = [norm for c in health for norm in c.norms]
    left.hist(norms, bins=40, density=True, color=BLUE, label="this bank")
    mean, spread = norm_law(health[0].statistics.dim)
    places = torch.linspace(mean - 4 * spread, mean + 4 * spread, 200)
    law = torch.exp(-(((places - mean) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
    left.plot(places.tolist(), law.tolist(), color=RED, label="white noise")
    left.set(title="Norm of the latents over √D", yticks=[])
    left.legend(frameon=False)
    for s in [c.statistics for c in health[:50]]:
        counts = [n for n in (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128) if n <= max(s.count, 2)]
        biases = [predicted_bias(s, n, math.inf) for n in counts]
        right.plot([math.sqrt(n) for n in counts], biases, color=RED, alpha=0.5)
        right.plot([1, math.sqrt(counts[-1])], [s.largest[0]] * 2, color=BLUE, alpha=0.5)
    right.legend(right.get_lines()[:2], ["fix/0, predicted", "fix/chm, predicted"], frameon=False)
    right.set(xlabel="√members", title="Bias of centroids: largest |channel mean|, by class")
    right.set_ylim(0, None)


@dataclass(frozen=True)
class EmbeddedSet:
    """Features of a set of images, and the number of each image's class among the real ones."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]

    def of(self, label: int) -> "EmbeddedSet":
        """Return the images of a class."""
        rows = self.labels == label
        return EmbeddedSet(self.features[rows], self.labels[rows])

    def distance(self, real: "EmbeddedSet") -> Tensor:
        """Return the `class_distance` of each image; of the set itself, NaN if a class has one."""
        if self is real and self.labels.bincount()[self.labels.unique()].min() < 2:
            return torch.tensor(math.nan)
        sets = self.features, self.labels, real.features, real.labels
        return class_distance(*sets, same=self is real)


def evaluate_images(
    fake: Source | Shards,
    real: Source | Shards,
    network: Network,
    form: Form | None = None,
    draws: int = 100,
) -> Evaluation:
    """Compare synthetic images with real ones.

    Args:
        fake: the synthetic images; their classes are among those of the real ones.
        real: the real images.
        network: the network whose features to compare.
        form: channels and resolution of both; by default those of the first synthetic image.
        draws: draws of the bootstrap of FID and KID; 0 leaves their intervals out.

    Raises:
        UserError: there are too few images, or images of another class.
    """
    form = form or form_of(fake)
    ours = embed(fake, real.classes, network, form, "synthetic")
    theirs = embed(real, real.classes, network, form, "real")
    check(2, ours.features, theirs.features)
    near = nearest_distance(ours.features, theirs.features)
    among = nearest_distance(theirs.features, theirs.features, same=True)
    alike = nearest_of_class(ours.features, ours.labels, theirs.features) < COPY_THRESHOLD
    measures = list(_measures(ours, theirs, near, among, alike, draws))
    rows = list(_class_rows(ours, theirs, near, alike, real.classes))
    title = f"{len(ours.labels)} synthetic images against {len(theirs.labels)} real ones"
    sampled = sampled_by(fake)
    if sampled:
        title += "; " + ", ".join(f"{key} {value!r}" for key, value in sampled.items())
    lacking = [repr(name) for name in real.classes if name not in {row["class"] for row in rows}]
    if lacking:
        title += f"; no synthetic images of {len(lacking)} classes: {first_few(lacking)}"
    draw = partial(_draw_images, near=near, among=among, rows=rows)
    return Evaluation(title, measures, rows, draw, sampled=sampled)


def sampled_by(images: Source | Shards) -> dict[str, Any]:
    """Return prompt, guidance and level of the first image of shards, as far as there are any."""
    about = images.about(0) if isinstance(images, Shards) and len(images) else {}
    known = {key: about[key] for key in ("prompt", "guidance") if key in about}
    plan = about.get("plan")
    return known | ({"level": plan["level"]} if isinstance(plan, dict) and "level" in plan else {})


def form_of(images: Source | Shards) -> Form:
    """Return channels and shorter side of the first image."""
    if not len(images):
        raise UserError("expected images to evaluate, got none")
    first = images[0][0]
    if isinstance(first, Tensor):
        return first.shape[0], min(first.shape[1:])
    return 1 if first.mode == "L" else 3, min(first.size)


def embed(
    images: Source | Shards, classes: list[str], network: Network, form: Form, name: str
) -> EmbeddedSet:
    """Compute the features of a set of images.

    Args:
        images: the images.
        classes: classes of the real images.
        network: see `evaluate_images`.
        form: see `evaluate_images`.
        name: name of the set, for the progress bar.

    Raises:
        UserError: a class is not among the given ones.
    """
    strange = [name for name in images.classes if name not in classes]
    if strange:
        raise UserError(
            f"expected synthetic images of the real ones' classes, got {strange[0]!r} too; give "
            "the real images of all classes"
        )
    order = torch.tensor([classes.index(name) for name in images.classes])
    labels, parts = order[torch.tensor(images.targets)], []
    with Progress(total=len(images), desc=name, unit="image") as bar:
        for start in range(0, len(images), BATCH):
            rows = range(start, min(start + BATCH, len(images)))
            parts.append(network(torch.stack([_load(images, row, form) for row in rows])))
            bar.update(len(rows))
    return EmbeddedSet(torch.cat(parts), labels)


def _load(images: Source | Shards, row: int, form: Form) -> Float[Tensor, "c r r"]:
    if isinstance(images, Shards):
        return prepare(images[row][0][None], *form)[0]
    return images.load(images.samples[row][0], *form)


def _measures(
    ours: EmbeddedSet,
    theirs: EmbeddedSet,
    near: Tensor,
    among: Tensor,
    alike: Tensor,
    draws: int,
) -> Iterator[Row]:
    """Yield a row of each measure of all images.

    The column ``real`` compares real images with the other real ones: as many as there are
    synthetic ones, or half of them.
    """
    sets = ours.features, theirs.features
    order = torch.randperm(len(sets[1]), generator=torch.Generator().manual_seed(0))
    count = min(len(sets[0]), len(order) // 2)
    some, rest = sets[1][order[:count]], sets[1][order[count:]]
    for name, distance in (("FID", frechet_distance), ("KID", kernel_distance)):
        error = 1.96 * deviation(distance, *sets, draws=draws) if draws else math.nan
        usual = distance(some, rest) if count > 1 else math.nan
        yield {"measure": name, "value": distance(*sets), "±": error, "real": usual}
    if min(len(some), len(sets[0])) > NEAREST:
        split = precision_recall(rest, some, NEAREST)
        for name, values in precision_recall(sets[1], sets[0], NEAREST).items():
            yield _mean_row(name, values, split[name].mean().item())
    yield _mean_row("class distance", ours.distance(theirs), theirs.distance(theirs).mean().item())
    yield _mean_row("nearest real", near, among.mean().item())
    copies, usual = ((x < COPY_THRESHOLD).double() for x in (near, among))
    yield _mean_row(f"copies (nearest < {COPY_THRESHOLD})", copies, usual.mean().item())
    usual = nearest_of_class(theirs.features, theirs.labels, theirs.features) < COPY_THRESHOLD
    name = f"alike (nearest synthetic of its class < {COPY_THRESHOLD})"
    yield _mean_row(name, alike.double(), usual.double().mean().item())


def _mean_row(name: str, values: Tensor, real: float) -> Row:
    """Return a mean and the half width of its 95 % interval."""
    error = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"measure": name, "value": values.mean().item(), "±": error, "real": real}


def _class_rows(
    ours: EmbeddedSet, theirs: EmbeddedSet, near: Tensor, alike: Tensor, classes: list[str]
) -> Iterator[Row]:
    for label in ours.labels.unique().tolist():
        fake, real = ours.of(label), theirs.of(label)
        distance = _mean_row("", fake.distance(real), math.nan)
        yield {
            "class": classes[label],
            "real": len(real.labels),
            "synthetic": len(fake.labels),
            "class distance": distance["value"],
            "±": distance["±"],
            "of real": real.distance(real).mean().item(),
            "diversity": diversity(fake.features),
            "of real images": diversity(real.features),
            "nearest real": near[ours.labels == label].median().item(),
            "alike": alike[ours.labels == label].double().mean().item(),
        }


def _draw_images(figure: "Figure", near: Tensor, among: Tensor, rows: Iterable[Row]) -> None:
    """Draw class distances by class, and distances to the nearest real image."""
    left, right = figure.subplots(1, 2)
    order = sorted(rows, key=lambda row: -float(row["class distance"]))[:MAX_BARS]
    places, means = range(len(order)), [float(row["class distance"]) for row in order]
    errors = {"xerr": [row["±"] for row in order], "error_kw": {"lw": 1}}
    left.barh(places, means, color=BLUE, label="synthetic", **errors)
    left.plot([row["of real"] for row in order], places, "|", ms=12, mew=2, color=RED, label="real")
    names = [str(row["class"]) for row in order]
    names = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in names]
    left.set_yticks(places, names, fontsize=7)
    left.set(title="Class distance", xlabel="1 − cosine to the class's mean real feature; ± 95 %")
    left.legend(frameon=False)
    top = min(4.0, torch.cat([near, among]).max().item())
    style = {"bins": 40, "range": (0, top), "density": True, "histtype": "step"}
    for values, color, label in ((among, RED, "real"), (near, BLUE, "synthetic")):
        right.hist(values.clamp_max(top).tolist(), color=color, label=label, **style)
    right.axvline(COPY_THRESHOLD, color="black", lw=0.8, ls=":")
    right.set(title="Nearest real", xlabel="distance; left of the line: copies", yticks=[])
    right.legend(frameon=False)
