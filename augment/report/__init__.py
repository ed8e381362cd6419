"""The report: a bank's classes, its health, and what each rule makes of it, in one HTML file.

Few-shot augmentation is judged by eye first. So one should see one's classes, what is wrong with
the latents in plain sentences, and the same members mixed by each rule, and then choose.

The file needs no other and no network. `augment.measure.health` says what is wrong,
`augment.report.plots` draws it, `augment.report.gallery` makes the pictures,
`augment.report.provenance` knows how each is made again, `augment.report.facts` has the numbers,
and `augment.report.page` puts it all together. `augment.report.evaluate` measures without pictures.
"""

from collections.abc import Sequence
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

from augment import __version__
from augment.bank.bank import LatentBank
from augment.centroid import Rule
from augment.core.errors import UserError
from augment.core.files import write_bytes
from augment.core.progress import Progress
from augment.diffusion.backbone import Backbone
from augment.measure.bias import BIAS_THRESHOLD
from augment.measure.health import VERDICT, ClassHealth, findings, from_most_biased
from augment.networks import Network
from augment.report import facts, page
from augment.report.gallery import BACK, Gallery, side_of
from augment.report.plots import bias_plot, norm_plot
from augment.report.provenance import Provenance
from augment.report.tiles import sprite
from augment.sources import Source, as_source, place_of

__all__ = ["RULES", "write_report"]

RULES = ("lin/0", "fix/0", "fix/chm", "fade/chm")
"""Rules whose centroids are compared by default: blurred, biased, the cure, and our default."""


def write_report(
    bank: LatentBank,
    out: str | Path,
    shards: str | Path | None = None,
    backbone: Backbone | None = None,
    rules: Sequence[str] = RULES,
    classes: int = 50,
    images: Source | str | Path | Any | None = None,
    pool: str | Path | None = None,
    command: str = "",
    network: Network | None = None,
) -> Path:
    """Write the report of a bank.

    Args:
        bank: the bank.
        out: the HTML file.
        shards: folder of synthetic images made with it; it need not be finished.
        backbone: the model that the bank was made with, to sample some images back and to make
            centroids; without it there are only the images on disk.
        rules: names of the rules of centroids, which have the members, weights and noise of the
            shards' first images, or else of those that ``synthesize`` makes by default.
        classes: maximum number of classes to make images of, from the most biased to the least.
        images: the real images, a folder or a source; by default where they were.
        pool: file of a `ReplayPool`, for its throughput and reuse.
        command: the command that made the report, to be shown.
        network: compares the synthetic images of each class with the real ones, by its features:
            their distance and diversity are columns of the table of classes.

    Returns:
        The file.

    Raises:
        BankMismatch: the bank is of another backbone.
        UserError: the shards are damaged or of other classes, a rule is unknown or does not fit a
            class, there is a network without shards, or the file cannot be written.
    """
    if classes < 0:
        raise UserError(f"expected a number of classes ≥ 0, got {classes}; 0 makes no images")
    names = [str(Rule.parse(rule)) for rule in rules]
    provenance = Provenance.of(bank, None if shards is None else Path(shards))
    compared = _compared(provenance, network, images)
    pool_facts = facts.pool_facts(Path(pool)) if pool else {}
    health = [
        bank.health(name) for name in Progress(bank.classes, "measure", unit="class", delay=2)
    ]
    some = [] if backbone is None else from_most_biased(health, classes)
    side = side_of(bank, backbone, len(health), len(some), len(names))
    gallery = Gallery(provenance, backbone, names, place_of(images), side)
    if some:
        gallery.paint(some)
    records = [
        _record(gallery, c) | compared.get(c.name, {})
        for c in Progress(health, "pictures", unit="class", delay=2)
    ]
    numbers = facts.bank_facts(bank, health) | facts.synthetic_facts(gallery) | pool_facts
    found = findings(health, *bank.made_by)
    first = [finding for finding in found if finding.topic in VERDICT] or found[:1]
    parts = {
        "name": escape("/".join(bank.path.parts[-2:])),  # most banks are called bank
        "path": escape(f"{bank.path} · {date.today()} · latent-augment {__version__}"),
        "summary": escape(facts.summary(bank, health)),
        "verdict": page.finding_items(first),
        "findings": page.finding_items([finding for finding in found if finding not in first]),
        "facts": page.facts_list(numbers),
        "norms": norm_plot(health),
        "bias": bias_plot(bank, health),
        "worst": escape(from_most_biased(health, 1)[0].name),
        "notes": page.paragraphs(facts.notes(gallery, len(some), len(health))),
        "rejects": page.rejects_section(facts.rejects_of(bank)),
        "making": facts.making_section(provenance, command),
    }
    folder = provenance.folder
    filters = folder.manifest.filters if folder else {}
    data = {
        "side": side,
        "pairs": BACK,
        "threshold": BIAS_THRESHOLD,
        "columns": facts.columns(folder, health, bool(compared)),
        "minima": {name: settings.get("minimum") for name, settings in filters.items()},
        "classes": records,
    }
    write_bytes(Path(out), page.assemble(parts, data))
    return Path(out)


def _compared(
    provenance: Provenance, network: Network | None, images: Source | str | Path | Any | None
) -> dict[str, dict[str, float | None]]:
    """Return `augment.report.facts.comparison` if there is a network."""
    if network is None:
        return {}
    if provenance.folder is None:
        raise UserError(
            "expected synthetic images for the network to compare, got none; pass --shards"
        )
    real = as_source(provenance.bank.manifest.source if images is None else images)
    return facts.comparison(provenance.folder, real, network)


def _record(gallery: Gallery, health: ClassHealth) -> dict[str, object]:
    """Return what the page shows of a class."""
    bank, folder, name = gallery.bank, gallery.provenance.folder, health.name
    tiles = gallery.tiles(health)
    record: dict[str, object] = {"name": name, "prompt": bank.prompt(name)}
    record["label"] = bank.classes.index(name)
    record |= {key: value for key, value in health.row().items() if key != "class"}
    if folder is not None:
        why = {key: counts[name] for key, counts in folder.tally.refused.items() if counts[name]}
        record |= {"synthetic": len(folder.rows(name)), "refused": sum(why.values()), "why": why}
    return {**record, "sprite": sprite(tiles), "tiles": [tile.record() for tile in tiles]}
