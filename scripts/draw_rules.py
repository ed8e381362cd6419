"""Draw what centroids of many latents become under four rules: ``python scripts/draw_rules.py``.

The first picture of the README: for each class four of 32 embedded images, sampled back from their
latents, and the centroid of all 32 latents in equal parts.
"""

import argparse
from pathlib import Path

from augment import Plan, Rule, Synthesizer, fill_bank, load_backbone
from augment.sources import Folder
from augment.sources.fashion import write_fashion
from augment.sources.images import sheet

RULES = ("lin/0", "fix/0", "fix/chm", "fade/chm")
SHOWN = 4


def main() -> None:
    """Invert, mix, sample, and write one contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/rules"))
    parser.add_argument("--classes", nargs="+", default=["Trouser", "Sandal", "Shirt", "Bag"])
    parser.add_argument("--out", type=Path, default=Path("docs/rules.png"))
    args = parser.parse_args()
    backbone = load_backbone("tiny")
    source = Folder(write_fashion(args.run / "images", "shots"))
    bank = fill_bank(args.run / "bank", backbone, source, stored=())
    rows = {}
    for name in args.classes:
        ids = bank.members[name]
        alone = [Plan.equal(0, name, [i]) for i in ids[:SHOWN]]
        whole = Plan.equal(0, name, ids)
        rows[name] = list(Synthesizer(backbone, bank, Rule.parse("lin/0")).images(alone))
        for rule in RULES:
            rows[name] += list(Synthesizer(backbone, bank, Rule.parse(rule)).images([whole]))
    heads = [f"image {k + 1}" for k in range(SHOWN)] + [f"32: {rule}" for rule in RULES]
    sheet(rows, heads).save(args.out)


if __name__ == "__main__":
    main()
