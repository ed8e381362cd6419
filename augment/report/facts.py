"""Sentences and numbers of a report, beside its pictures and plots."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from augment.bank.bank import LatentBank
from augment.bank.format import Reject
from augment.core.errors import UserError, first_few
from augment.core.schema import as_object
from augment.measure.health import ClassHealth
from augment.measure.latents import norm_law
from augment.networks import Network
from augment.replay.store import CONTROL, MAGIC
from augment.report.evaluate import evaluate_images, sampled_by
from augment.report.gallery import Gallery
from augment.report.page import code_block, settings_block
from augment.report.provenance import (
    Provenance,
    ShardFolder,
    invert_command,
    synthesize_command,
)
from augment.sources import Source


def summary(bank: LatentBank, health: Sequence[ClassHealth]) -> str:
    """Describe the bank in a line."""
    counts = [c.statistics.count for c in health]
    each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return (
        f"{sum(counts):,} images of {len(health):,} classes, {each} each, inverted with "
        f"{bank.recipe['name_or_path']} by {bank.inverted_by}"
    )


def bank_facts(bank: LatentBank, health: Sequence[ClassHealth]) -> dict[str, str]:
    """Return numbers of the bank."""
    norms = [norm for c in health for norm in c.norms]
    psnrs = [c.psnr for c in health if c.psnr is not None]
    law, deviation = norm_law(health[0].statistics.dim)
    versions = bank.manifest.made_with.items()
    return {
        "latent": " × ".join(map(str, bank.manifest.latent_shape)),
        **guidance_facts(bank),
        **({} if bank.level is None else {"level": f"{bank.level:.3g}"}),
        "norm / √D": f"{fmean(norms):.3f} (white noise {law:.3f} ± {deviation:.3f})",
        "sampled back": f"{fmean(psnrs):.1f} dB (PSNR)" if psnrs else "not measured",
        "left out": f"{len(rejects_of(bank))} images",
        "made with": ", ".join(f"{name} {version}" for name, version in versions),
    }


def guidance_facts(bank: LatentBank) -> dict[str, str]:
    """Return the prompts and the guidance of the inversion and of sampling."""
    some, usage = next(filter(None, map(bank.prompt, bank.classes)), ""), bank.manifest.usage
    inverting = f"{bank.inversion['guidance']:g}"
    facts = {"prompts": f"{usage.template or some!r}"} if usage and some else {}
    if bank.guidance == bank.inversion["guidance"]:
        return facts | {"guidance": inverting}
    return facts | {"guidance": f"{inverting} to invert, {bank.guidance:g} to sample"}


def synthetic_facts(gallery: Gallery) -> dict[str, str]:
    """Return numbers of the synthetic images, and of those that were made for the report."""
    folder, facts = gallery.provenance.folder, {}
    if folder is not None:
        tally, manifest = folder.tally, folder.manifest
        facts["synthetic"] = (
            f"{tally.written:,} images by {manifest.rule}, in {tally.shards} of {manifest.shards} "
            "shards"
        )
        facts["kept"] = f"{tally.written / max(tally.wanted, 1):.1%} of those wanted"
        if sampled := sampled_by(folder.shards):
            words = (f"{key} {value!r}" for key, value in sampled.items())
            facts["sampled with"] = ", ".join(words)
        for name, counts in tally.refused.items():
            facts[f"refused by {name}"] = f"{counts.total():,} candidates"
        if pace := shard_pace(folder):
            facts["written at"] = f"{pace:.3g} images/s, by the dates of the shards"
    count, seconds = gallery.speed
    if count:
        facts["for this report"] = (
            f"{count} images made in {seconds:.0f} s ({count / max(seconds, 1e-9):.3g} a second)"
        )
    return facts


def shard_pace(folder: ShardFolder) -> float | None:
    """Return the images a second between one shard and the next, by the dates of their records.

    The median, so that a pause does not count. None if there are two shards or fewer, or their
    dates are alike as after a copy.
    """
    records = [path.with_suffix(".json") for path in folder.shards.paths]
    dates = sorted(path.stat().st_mtime for path in records)
    gaps = [b - a for a, b in pairwise(dates)]
    if len(gaps) < 2 or median(gaps) < 0.01:
        return None
    return len(folder.shards) / len(records) / median(gaps)


def pool_facts(path: Path) -> dict[str, str]:
    """Return throughput and reuse factor of a replay pool, from its file.

    Raises:
        UserError: there is none.
    """
    try:
        control: Any = np.fromfile(path, CONTROL, 1)
    except OSError as error:
        raise UserError(
            f"expected the file of a replay pool at {path}, got {error.strerror or error}; give "
            "the path that the pool has"
        ) from None
    if not len(control) or control["magic"][0] != MAGIC:
        raise UserError(f"expected the file of a replay pool at {path}, got another; choose that")
    control = control[0]
    made, draws = int(control["made"]), int(control["draws"].sum())
    seconds = float(control["beat"] - control["started"])
    facts = {
        "reuse factor": f"{draws / max(made, 1):.1f} (pool: {draws:,} draws of {made:,} images)"
    }
    if seconds > 0 and made > control["before"]:
        facts["pool made"] = f"{(made - control['before']) / seconds:.3g} images/s in its last run"
    return facts


def rejects_of(bank: LatentBank) -> list[Reject]:
    """Return the images that were left out."""
    return [r for chunks in bank.chunks.values() for c in chunks for r in c.rejects]


@dataclass(frozen=True)
class Column:
    """A column of the table of classes: key in their records, heading, digits, explanation.

    ``beside`` is the key of the same measure of the real images, if there is one.
    """

    key: str
    title: str
    digits: int
    hint: str
    beside: str = ""


DISTANCE = Column(
    "distance", "To real", 2, "1 − cosine of synthetic features to the mean of the real ones",
    "distance of real",
)  # fmt: skip
DIVERSITY = Column(
    "diversity", "Diversity", 2, "mean 1 − cosine between the features of two synthetic images",
    "diversity of real",
)  # fmt: skip


def comparison(
    folder: ShardFolder, real: Source, network: Network
) -> dict[str, dict[str, float | None]]:
    """Compare the synthetic images of each class with the real ones, by a network's features.

    Args:
        folder: the synthetic images.
        real: the real images.
        network: the network.

    Returns:
        The values of `DISTANCE` and `DIVERSITY` by class; None of a single image.

    Raises:
        UserError: see `augment.report.evaluate.evaluate_images`.
    """
    found = {}
    for row in evaluate_images(folder.shards, real, network, draws=0).classes:
        values = row["class distance"], row["of real"], row["diversity"], row["of real images"]
        keys = DISTANCE.key, DISTANCE.beside, DIVERSITY.key, DIVERSITY.beside
        finite = [value if math.isfinite(value) else None for value in map(float, values)]
        found[str(row["class"])] = dict(zip(keys, finite, strict=True))
    return found


def columns(
    folder: ShardFolder | None, health: Sequence[ClassHealth], compared: bool = False
) -> list[dict[str, object]]:
    """Return the columns of the table that have values."""
    shown = [
        Column("latents", "Images", 0, "real images in the bank"),
        Column("bias", "Bias", 3, "the largest |channel mean| of the latents; white noise has 0"),
        Column("fix/0 bias", "by fix/0", 2, "what fix/0 makes of it with all in equal parts"),
        Column("norm sigmas", "Norm, σ", 1, "standard errors of the mean norm off white noise's"),
    ]
    if any(c.errors for c in health):
        shown.append(Column("PSNR", "Back, dB", 1, "PSNR of the images sampled back"))
    if folder is not None:
        shown.append(Column("synthetic", "Synthetic", 0, "synthetic images in the shards"))
        shown += [DISTANCE, DIVERSITY] if compared else []
        if folder.tally.refused:
            hint = "times that a filter refused a candidate"
            shown.append(Column("refused", "Refused", 0, hint))
    return [asdict(column) for column in shown]


def notes(gallery: Gallery, painted: int, classes: int) -> Iterator[str]:
    """Yield what one has to know of the pictures, in sentences."""
    provenance = gallery.provenance
    if painted:
        ends = ", from the most biased to the least"
        some = "all classes" if painted == classes else f"{painted} classes{ends}"
        whose = "the shards' first images have" if provenance.planned else "synthesize draws first"
        yield (
            f"Centroids, of {some}: each row has the members and weights that {whose}, mixed by "
            "each rule, so that only the rule differs."
        )
    else:
        yield "No images were made for this report (without a backbone, or classes)."
    if gallery.missing:
        given = gallery.root.root if isinstance(gallery.root, Source) else gallery.root
        where = given or provenance.bank.manifest.source
        yield (
            f"{gallery.missing} real images are not in {where} as they were inverted, and have no "
            "picture here; say where they are with --images."
        )
    if provenance.folder is not None:
        yield from _shard_notes(provenance, provenance.folder, painted)


def _shard_notes(provenance: Provenance, folder: ShardFolder, painted: int) -> Iterator[str]:
    tally, manifest = folder.tally, folder.manifest
    if tally.shards < manifest.shards:
        yield (
            f"The synthetic images are not finished: {tally.shards} of {manifest.shards} shards "
            "are there; the same synthesize command goes on."
        )
    else:
        counts = tally.by_class(manifest.classes).items()
        if lacking := [repr(name) for name, (count, _) in counts if not count]:
            yield f"No synthetic images are there of {first_few(lacking)}."
    if manifest.bank != provenance.bank.digest:
        yield "The bank is no longer as it was when the synthetic images were made."
    if tally.refused:
        if manifest.refine:
            how = "refined ones are not made again here"
        elif not provenance.planned:
            how = "their plans are not known any more"
        elif painted:
            how = "some were made again for this page, from their plans"
        else:
            how = "with a backbone some are made again for this page"
        yield f"Shards do not keep what filters refused; {how}."


def making_section(provenance: Provenance, command: str) -> str:
    """Return the commands and settings that made everything, as HTML."""
    parts = [code_block("The bank", invert_command(provenance.bank))]
    folder, settings = provenance.folder, provenance.bank.manifest.settings
    if folder is not None:
        text = synthesize_command(provenance, folder)
        parts.append(code_block("The synthetic images", text))
    if command:
        parts.append(code_block("This report", command))
    title = "Settings of the bank: manifest.json, without its classes"
    parts.append(settings_block(title, settings))
    if folder is not None:
        settings = as_object(folder.manifest)
        kept = {key: value for key, value in settings.items() if key not in ("images", "classes")}
        title = "Settings of the synthetic images: synthesis.json, without its images"
        parts.append(settings_block(title, kept))
    return "".join(parts)
