"""Is a bank healthy, and are synthetic images good? A table, records and a plot.

A bank is measured by its latents alone (`augment.measure.latents`); images by a frozen network's
features against those of real images (`augment.measure.features`). Intervals are 95 %: of means by
their standard error, of FID and KID by the bootstrap.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from augment.bank.bank import LatentBank
from augment.core.errors import UserError, first_few
from augment.core.files import check_folder, write_bytes, write_json, write_table
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
    precision_recall,
)
from augment.measure.latents import LatentStatistics, latent_statistics
from augment.measure.reconstruction import lpips, psnr, reconstruction
from augment.networks import BATCH, Network
from augment.plan.plan import Plan
from augment.shards.dataset import Shards, open_shards
from augment.shards.format import holds_shards
from augment.sources import Folder, Source
from augment.sources.images import prepare
from augment.synthesis.synthesizer import Synthesizer

Row = dict[str, Any]
COPY = 0.4
"""A nearest distance below which an image is taken for a copy, as `duplicate` does."""
RECONSTRUCTED = 16  # images a class
LEARNED = 64  # pixels that the network of LPIPS needs
NEAREST = 5  # neighbour of precision and recall


@dataclass(frozen=True)
class Seen:
    """A set of images as a network sees it; labels are numbers of the real images' classes."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Args:
        title: of what, in a line.
        overall: a row a measure.
        classes: a row a class.
        draw: draws a figure of it into a matplotlib figure.
    """

    title: str
    overall: list[Row]
    classes: list[Row]
    draw: Callable[[Any], None]

    def __str__(self) -> str:
        return "\n".join([self.title, "", *markdown(self.overall), "", *markdown(self.classes)])

    def record(self) -> Row:
        """All of it for JSON, which has no NaN."""
        return plain({"title": self.title, "overall": self.overall, "classes": self.classes})

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


def markdown(rows: list[Row]) -> Iterator[str]:
    """A table of rows with the same keys."""
    cells = [[str(key) for key in rows[0]], *([told(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, line in enumerate(cells):
        yield "| " + " | ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)) + " |"
        if not number:
            yield "|" + "|".join("-" * (w + 2) for w in widths) + "|"


def told(value: Any) -> str:
    """A number as it is read."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """A record without NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_bank(
    bank: LatentBank, backbone: Backbone | None = None, real: Source | None = None
) -> Evaluation:
    """Whether the latents of a bank are the white noise that rules take them for.

    Columns: the largest |channel mean| and whether it is significant; what ``fix/0`` would make of
    it with all members and α = 1; the norm over √D and how many standard errors it is off;
    correlation of neighbouring pixels; and, if the bank has kept it, how well images come back, as
    PSNR.

    Args:
        bank: the bank.
        backbone: that it was made with; then some images of each class are sampled back, and
            compared with the real ones beside what the codec alone makes of them.
        real: the images that it was made of.

    Raises:
        BankMismatch: the bank is of another backbone.
        UserError: a class has none of the bank's images.
    """
    pair = None if backbone is None or real is None else (backbone, real)
    learned = backbone is not None and backbone.resolution >= LEARNED and has_lpips()
    found: dict[str, LatentStatistics] = {}
    for name in tqdm(bank.classes, "classes", unit="class", delay=2):
        found[name] = latent_statistics(bank.latents(name))
    kept = "errors" in bank.manifest.keeps
    rows = []
    for name, s in found.items():
        row: Row = {"class": name, "latents": s.count, "bias": s.largest[0], "biased": s.biased}
        row["fix/0 bias"] = predicted_bias(s, s.count, 1.0)
        row |= {"norm": s.norm, "norm sigmas": s.norm_sigmas, "correlation": s.horizontal}
        if kept:
            row["PSNR"] = psnr(bank.errors(name).mean().item())
        if pair is not None:
            row |= reconstruct(bank, *pair, name, learned)
        rows.append(row)
    overall = [
        {"measure": key, "mean": mean, "least": min(values), "most": max(values)}
        for key in list(rows[0])[2:]
        for values in [[float(row[key]) for row in rows]]
        for mean in [sum(values) / len(values)]
    ]
    title = f"bank {bank.path}: {sum(s.count for s in found.values())} latents"
    return Evaluation(title, overall, rows, lambda figure: draw_bank(figure, bank, found))


def has_lpips() -> bool:
    """Whether LPIPS can be measured; tells why if not."""
    try:
        lpips(torch.zeros(1, 3, LEARNED, LEARNED), torch.zeros(1, 3, LEARNED, LEARNED))
    except UserError as error:
        tqdm.write(f"without LPIPS: {error}")
        return False
    return True


def reconstruct(
    bank: LatentBank, backbone: Backbone, real: Source, name: str, learned: bool
) -> Row:
    """How well images of a class come back by the bank's latents, and by the codec alone."""
    known = set(real.ids.get(name, ()))
    ids = [i for i in bank.members[name] if i in known][:RECONSTRUCTED]
    if not ids:
        raise UserError(
            f"expected the images that bank {bank.path} was made of, got none of class {name!r}; "
            "give the folder or source that was inverted"
        )
    label, form = bank.classes.index(name), (backbone.channels, backbone.resolution)
    plans = [Plan.equal(label, name, [i], k) for k, i in enumerate(ids)]
    images = torch.stack([real.load(i, *form) for i in ids])
    made = {
        "back": Synthesizer(backbone, bank, "lin/0").images(plans).cpu(),
        "codec": backbone.decode(backbone.encode(images)).cpu(),
    }
    row: Row = {}
    for measure in ("mse", "psnr", "ssim"):
        for way, others in made.items():
            row[f"{way} {measure.upper()}"] = reconstruction(images, others)[measure].mean().item()
    if learned:
        row |= {f"{way} LPIPS": lpips(images, x).mean().item() for way, x in made.items()}
    return row


def draw_bank(figure: Any, bank: LatentBank, found: dict[str, LatentStatistics]) -> None:
    """Norms against the chi law, and what ``fix/0`` makes of the bias of each class."""
    left, right = figure.subplots(1, 2)
    norms = torch.cat([bank.latents(name).flatten(1).norm(dim=1) for name in bank.classes])
    some = next(iter(found.values()))
    root = math.sqrt(some.dim)
    left.hist((norms / root).tolist(), bins=40, density=True, color="#0072b2", label="this bank")
    mean, spread = some.norm_law
    places = torch.linspace(mean - 4 * spread, mean + 4 * spread, 200)
    law = torch.exp(-(((places - mean) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
    left.plot(places.tolist(), law.tolist(), color="#d55e00", label="white noise")
    left.set(title="Norm of the latents over √D", yticks=[])
    left.legend(frameon=False)
    for s in list(found.values())[:50]:
        counts = [n for n in (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128) if n <= max(s.count, 2)]
        biases = [predicted_bias(s, n, math.inf) for n in counts]
        right.plot([math.sqrt(n) for n in counts], biases, color="#d55e00", alpha=0.5)
        right.plot([1, math.sqrt(counts[-1])], [s.largest[0]] * 2, color="#0072b2", alpha=0.5)
    right.legend(right.get_lines()[:2], ["fix/0, foretold", "chm rules"], frameon=False)
    right.set(xlabel="√members", title="Largest |channel mean| of centroids, by class")
    right.set_ylim(0, None)


def evaluate_images(
    fake: Source | Shards,
    real: Source | Shards,
    network: Network,
    form: tuple[int, int] | None = None,
    draws: int = 100,
) -> Evaluation:
    """Synthetic images against real ones.

    Args:
        fake: the synthetic images; classes out of those of the real ones.
        real: the real ones.
        network: what sees them.
        form: channels and resolution of both; those of the first synthetic image by default.
        draws: of the bootstrap of FID and KID; 0 leaves their intervals out.

    Raises:
        UserError: there are too few images, or of another class.
    """
    form = form or form_of(fake)
    ours, theirs = (
        see(part, real.classes, network, form, name)
        for part, name in ((fake, "synthetic"), (real, "real"))
    )
    check(2, ours.features, theirs.features)
    near = nearest_distance(ours.features, theirs.features)
    among = nearest_distance(theirs.features, theirs.features, same=True)
    measured = list(measure(ours, theirs, near, among, draws))
    rows = list(by_class(ours, theirs, near, real.classes))
    title = f"{len(ours.labels)} synthetic images against {len(theirs.labels)} real ones"
    lacking = [repr(name) for name in real.classes if name not in {row["class"] for row in rows}]
    if lacking:
        title += f"; no synthetic images of {len(lacking)} classes: {first_few(lacking)}"
    return Evaluation(title, measured, rows, lambda figure: draw_images(figure, near, among, rows))


def form_of(images: Source | Shards) -> tuple[int, int]:
    """Channels and shorter side of the first image."""
    if not len(images):
        raise UserError("expected images to evaluate, got none")
    first = images[0][0]
    if isinstance(first, Tensor):
        return first.shape[0], min(first.shape[1:])
    return 1 if first.mode == "L" else 3, min(first.size)


def see(
    images: Source | Shards, classes: list[str], network: Network, form: tuple[int, int], name: str
) -> Seen:
    """A set as the network sees it.

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
    with tqdm(total=len(images), desc=name, unit="image") as bar:
        for start in range(0, len(images), BATCH):
            rows = range(start, min(start + BATCH, len(images)))
            parts.append(network(torch.stack([load(images, row, form) for row in rows])))
            bar.update(len(rows))
    return Seen(torch.cat(parts), labels)


def load(images: Source | Shards, row: int, form: tuple[int, int]) -> Float[Tensor, "c r r"]:
    """An image, in a form."""
    if isinstance(images, Shards):
        return prepare(images[row][0][None], *form)[0]
    return images.load(images.samples[row][0], *form)


def measure(ours: Seen, theirs: Seen, near: Tensor, usual: Tensor, draws: int) -> Iterator[Row]:
    """A row a measure of all images.

    ``real`` is what so many real images have against the other real ones: as many as there are
    synthetic ones, or half of them.
    """
    sets = ours.features, theirs.features
    order = torch.randperm(len(sets[1]), generator=torch.Generator().manual_seed(0))
    count = min(len(sets[0]), len(order) // 2)
    some, rest = sets[1][order[:count]], sets[1][order[count:]]
    for name, distance in (("FID", frechet_distance), ("KID", kernel_distance)):
        error = 1.96 * deviation(distance, *sets, draws=draws) if draws else math.nan
        among = distance(some, rest) if count > 1 else math.nan
        yield {"measure": name, "value": distance(*sets), "±": error, "real": among}
    if min(len(some), len(sets[0])) > NEAREST:
        among = precision_recall(rest, some, NEAREST)
        for name, values in precision_recall(sets[1], sets[0], NEAREST).items():
            yield {"measure": name, **mean_of(values), "real": among[name].mean().item()}
    values = class_distance(ours.features, ours.labels, theirs.features, theirs.labels)
    yield {"measure": "class distance", **mean_of(values), "real": own_distance(theirs)}
    yield {"measure": "nearest real", **mean_of(near), "real": usual.mean().item()}
    copies, few = ((x < COPY).double() for x in (near, usual))
    yield {"measure": f"copies (nearest < {COPY})", **mean_of(copies), "real": few.mean().item()}


def own_distance(theirs: Seen) -> float:
    """The class distance of real images to the others of their class; NaN if any has none."""
    if theirs.labels.bincount()[theirs.labels.unique()].min() < 2:
        return math.nan
    pair = theirs.features, theirs.labels
    return class_distance(*pair, *pair, same=True).mean().item()


def mean_of(values: Tensor) -> Row:
    """A mean and the half width of its 95 % interval."""
    error = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"value": values.mean().item(), "±": error}


def by_class(ours: Seen, theirs: Seen, near: Tensor, classes: list[str]) -> Iterator[Row]:
    """A row a class that has synthetic images."""
    for label in ours.labels.unique().tolist():
        mine, those = ours.labels == label, theirs.labels == label
        fakes = Seen(ours.features[mine], ours.labels[mine])
        reals = Seen(theirs.features[those], theirs.labels[those])
        distance = class_distance(fakes.features, fakes.labels, reals.features, reals.labels)
        yield {
            "class": classes[label],
            "real": len(reals.labels),
            "synthetic": len(fakes.labels),
            "class distance": distance.mean().item(),
            "of real": own_distance(reals),
            "diversity": diversity(fakes.features),
            "of real images": diversity(reals.features),
            "nearest real": near[mine].median().item(),
        }


def draw_images(figure: Any, near: Tensor, among: Tensor, rows: Iterable[Row]) -> None:
    """Class distances by class, and distances to the nearest real image."""
    left, right = figure.subplots(1, 2)
    order = sorted(rows, key=lambda row: -row["class distance"])[:40]
    places = range(len(order))
    left.barh(places, [row["class distance"] for row in order], color="#0072b2", label="synthetic")
    left.plot([row["of real"] for row in order], places, "|", ms=12, color="#d55e00", label="real")
    left.set_yticks(places, [row["class"] for row in order], fontsize=7)
    left.set(title="Distance to the class's mean feature")
    left.legend(frameon=False)
    most = min(4.0, torch.cat([near, among]).max().item())
    for values, color, label in ((among, "#d55e00", "real"), (near, "#0072b2", "synthetic")):
        right.hist(
            values.clamp_max(most).tolist(), bins=40, range=(0, most), density=True,
            histtype="step", color=color, label=label,
        )  # fmt: skip
    right.axvline(COPY, color="black", lw=0.8, ls=":")
    right.set(title="Distance to the nearest real image (left of the line: copies)")
    right.set_yticks([])
    right.legend(frameon=False)


def open_images(path: str | Path) -> Source | Shards:
    """Shards or a folder of images.

    Raises:
        UserError: there are none.
    """
    return open_shards(path) if holds_shards(path) else Folder(path)
