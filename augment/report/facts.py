"""What a report says in words and numbers beside its pictures and plots."""

from collections.abc import Sequence
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
from augment.replay.store import CONTROL, MAGIC
from augment.report.again import Making, invert_command, synthesize_command
from augment.report.gallery import Gallery
from augment.report.page import code_block, settings_block
from augment.sources import Source


def summary(bank: LatentBank, health: Sequence[ClassHealth]) -> str:
    """What the bank is, in a line."""
    total, method = sum(c.statistics.count for c in health), bank.inversion
    counts = [c.statistics.count for c in health]
    each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return (
        f"{total:,} images of {len(health):,} classes, {each} each, inverted with "
        f"{bank.recipe['name_or_path']} by {method['method']} in {method['steps']} steps"
    )


def bank_facts(bank: LatentBank, health: Sequence[ClassHealth]) -> dict[str, str]:
    """Numbers of the bank."""
    shape, made = bank.manifest.latent_shape, bank.manifest.made_with
    norms = [norm for c in health for norm in c.norms]
    psnrs = [c.psnr for c in health if c.psnr is not None]
    law, spread = norm_law(health[0].statistics.dim)
    return {
        "latent": " × ".join(map(str, shape)),
        "guidance": f"{bank.inversion['guidance']:g}",
        "norm / √D": f"{fmean(norms):.3f} (white noise {law:.3f} ± {spread:.3f})",
        "sampled back": f"{fmean(psnrs):.1f} dB (PSNR)" if psnrs else "not measured",
        "left out": f"{len(rejects_of(bank))} images",
        "made with": ", ".join(f"{name} {version}" for name, version in made.items()),
    }


def making_facts(gallery: Gallery) -> dict[str, str]:
    """Numbers of the synthetic images, and of those that were made for the report."""
    making, facts = gallery.making, {}
    if making.shards is not None:
        tally, kept = making.tally, making.settings
        facts["synthetic"] = (
            f"{tally.written:,} images by {kept.rule if making.job else 'hand'}, in "
            f"{tally.shards} of {kept.shards} shards"
        )
        facts["kept"] = f"{tally.written / max(tally.wanted, 1):.1%} of those wanted"
        for name, counts in tally.refused.items():
            facts[f"refused by {name}"] = f"{counts.total():,} candidates"
        pace = shard_pace(making)
        if pace:
            facts["written at"] = f"{pace:.3g} images/s, by the dates of the shards"
    count, seconds = gallery.speed
    if count:
        facts["for this report"] = (
            f"{count} images made in {seconds:.0f} s ({count / max(seconds, 1e-9):.3g} a second)"
        )
    return facts


def shard_pace(making: Making) -> float | None:
    """Images a second between one shard and the next, by the dates of their records.

    The median, so that a pause does not count. None where two shards or fewer tell too little, or
    dates are alike as after a copy.
    """
    assert making.shards is not None
    records = [path.with_suffix(".json") for path in making.shards.paths]
    dates = sorted(path.stat().st_mtime for path in records)
    gaps = [b - a for a, b in pairwise(dates)]
    if len(gaps) < 2 or median(gaps) < 0.01:
        return None
    return len(making.shards) / len(records) / median(gaps)


def pool_facts(path: Path) -> dict[str, str]:
    """Throughput and reuse factor of a replay pool, from its file.

    Raises:
        UserError: there is none.
    """
    try:
        found: Any = np.fromfile(path, CONTROL, 1)
    except OSError as error:
        raise UserError(
            f"expected the file of a replay pool at {path}, got {error.strerror or error}; give "
            "the path that the pool has"
        ) from None
    if not len(found) or found["magic"][0] != MAGIC:
        raise UserError(f"expected the file of a replay pool at {path}, got another; choose that")
    control = found[0]
    made, draws = int(control["made"]), int(control["draws"].sum())
    seconds = float(control["beat"] - control["started"])
    facts = {
        "reuse factor": f"{draws / max(made, 1):.1f} (pool: {draws:,} draws of {made:,} images)"
    }
    if seconds > 0 and made > control["before"]:
        facts["pool made"] = f"{(made - control['before']) / seconds:.3g} images/s in its last run"
    return facts


def rejects_of(bank: LatentBank) -> list[Reject]:
    """The images that were left out."""
    return [r for chunks in bank.chunks.values() for c in chunks for r in c.rejects]


def columns(making: Making, health: Sequence[ClassHealth]) -> list[dict[str, Any]]:
    """The columns of the table: key, title, digits after the point, and what they are."""
    shown = [
        ("latents", "Images", 0, "real images in the bank"),
        ("bias", "Bias", 3, "the largest |channel mean| of the latents; white noise has 0"),
        (
            "fix/0 bias",
            "by fix/0",
            2,
            "what fix/0 makes of the bias with all members in equal parts",
        ),
        (
            "norm sigmas",
            "Norm, σ",
            1,
            "standard errors by which the mean norm is off white noise's",
        ),
    ]
    if any(c.errors for c in health):
        shown.append(("PSNR", "Back, dB", 1, "PSNR of the images sampled back from their latents"))
    if making.shards is not None:
        shown.append(("synthetic", "Synthetic", 0, "synthetic images in the shards"))
    if making.tally.refused:
        shown.append(("refused", "Refused", 0, "times that a filter refused a candidate"))
    keys = ("key", "title", "digits", "hint")
    return [dict(zip(keys, column, strict=True)) for column in shown]


def notes(gallery: Gallery, painted: int, classes: int) -> list[str]:
    """What one has to know of the pictures, in sentences."""
    making, told = gallery.making, []
    if not painted:
        told.append("No images were made for this report (without a backbone, or classes).")
    else:
        some = (
            "all classes"
            if painted == classes
            else f"{painted} classes, from the most biased to the least"
        )
        whose = (
            "the shards' first images have" if making.planned else "synthesize throws by default"
        )
        told.append(
            f"Centroids, of {some}: each row has the members and weights that {whose}, mixed by "
            "each rule, so that only the rule differs."
        )
    if gallery.missing:
        given = gallery.root.root if isinstance(gallery.root, Source) else gallery.root
        where = given or making.bank.manifest.source
        told.append(
            f"{gallery.missing} real images are not in {where} as they were inverted, and have no "
            "picture here; say where they are with --images."
        )
    return told + shard_notes(gallery, painted)


def shard_notes(gallery: Gallery, painted: int) -> list[str]:
    """What one has to know of the synthetic images."""
    making, told = gallery.making, []
    if making.shards is None:
        return told
    kept = making.settings
    if not making.job:
        told.append("The synthetic images were chosen one by one, with explore.")
    if making.tally.shards < kept.shards:
        told.append(
            f"The synthetic images are not finished: {making.tally.shards} of {kept.shards} "
            "shards are there; the same synthesize command goes on."
        )
    lacking = [
        repr(name)
        for name, (count, _) in making.tally.by_class(kept.classes).items()
        if not count and making.tally.shards == kept.shards
    ]
    if lacking:
        told.append(f"No synthetic images are there of {first_few(lacking)}.")
    if kept.bank != making.bank.digest:
        told.append("The bank is no longer as it was when the synthetic images were made.")
    if making.tally.refused:
        if kept.refine:
            how = "refined ones are not made again here"
        elif not making.planned:
            how = "their plans are not known any more"
        elif painted:
            how = "some were made again for this page, from their plans"
        else:
            how = "with a backbone some are made again for this page"
        told.append(f"Shards do not keep what filters refused; {how}.")
    return told


def making_section(making: Making, command: str) -> str:
    """The commands and settings that made everything."""
    manifest = making.bank.manifest.settings
    parts = [code_block("The bank", invert_command(making.bank))]
    if making.job:
        parts.append(code_block("The synthetic images", synthesize_command(making)))
    if command:
        parts.append(code_block("This report", command))
    parts.append(
        settings_block("Settings of the bank: manifest.json, without its classes", manifest)
    )
    if making.shards is not None:
        facts = as_object(making.settings).items()
        kept = {key: value for key, value in facts if key not in ("images", "classes")}
        title = "Settings of the synthetic images: synthesis.json, without its images"
        parts.append(settings_block(title, kept))
    return "".join(parts)
