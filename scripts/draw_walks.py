"""Draw every walk between two latents of a bank: ``python scripts/draw_walks.py --bank BANK``.

The picture in docs is of the demo's bank: a walk a row, from the first image of one class to the
first of another.
"""

import argparse
from pathlib import Path

import torch

from augment import LatentBank, load_backbone, sample, walk
from augment.centroid import WALKS
from augment.sources.images import sheet
from augment.synthesis.synthesizer import resolve


def main() -> None:
    """Walk, sample, and write one contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bank", type=Path, default=Path("runs/demo/bank"))
    parser.add_argument("--ends", nargs=2, default=("Trouser", "Ankle boot"), metavar="CLASS")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("docs/walks.png"))
    args = parser.parse_args()
    bank, rows = LatentBank.open(args.bank), {}
    backbone = load_backbone(**bank.recipe)
    how = vars(resolve(bank))
    first, last = (bank.latents(name)[0] for name in args.ends)
    for name in WALKS:
        frames = walk(first, last, args.frames, name)
        rows[name] = list(sample(backbone, frames, None, **how))
        norms = frames.flatten(1).norm(dim=1) / torch.tensor(frames[0].numel()).sqrt()
        print(f"{name:11} norm / √D " + " ".join(f"{norm:.2f}" for norm in norms))
    places = [f"{place:.2f}" for place in torch.linspace(0, 1, args.frames).tolist()]
    sheet(rows, places).save(args.out)


if __name__ == "__main__":
    main()
