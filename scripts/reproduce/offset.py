"""What a constant offset of one channel does, at the noisiest level and in the clean latent.

    python scripts/reproduce/offset.py --quick
    python scripts/reproduce/offset.py

Landolsi & Kahl, arXiv 2505.07481, Fig. 6: b is added to one channel, in the left half only, at
t = T before sampling, or at t = 0 before decoding. The table has the slope of the clean latent's
channel mean in b, in each half; at t = 0 it is 1 and 0 by construction. Sampling amplifies the
offset, at most 1/α(T)-fold, where the network takes it for the remainder of an image.
"""

import torch
from claims import claim, conclude, options
from judge import show
from matplotlib.figure import Figure
from tqdm import tqdm

from augment.core.rng import normal, rng
from augment.diffusion import load_backbone
from augment.diffusion.solver import sample
from augment.measure.relations import offset_response, shifted

OFFSETS = (-0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5)


def main() -> None:
    """Shift, sample, measure, draw, judge."""
    parser = options("A channel offset at T and at 0: arXiv 2505.07481, Fig. 6.", "offset")
    args = parser.parse_args()
    count, steps = (16, 20) if args.quick else (64, 50)
    backbone = load_backbone(args.backbone)
    noises = normal(rng(0, "noise"), count, *backbone.latent_shape)
    clean = backbone.encode(sample(backbone, noises[:1], None, "ddim", steps))
    channels, alpha = backbone.latent_shape[0], backbone.process.alpha_sigma(1)[0]
    figure = Figure(figsize=(1.3 * len(OFFSETS), 2.7 * channels), layout="constrained")
    grid = figure.subplots(2 * channels, len(OFFSETS))
    rows = []
    for channel in tqdm(range(channels), "channels"):
        slope, late = offset_response(backbone, noises, channel, OFFSETS, steps=steps)
        early = torch.cat([backbone.decode(shifted(clean, channel, b)) for b in OFFSETS]).cpu()
        left, right = slope.tolist()
        rows.append({"channel": channel, "left half": left, "right half": right})
        for line, images, name in ((0, late, "T"), (1, early, "0")):
            for axes, image, b in zip(grid[2 * channel + line], images, OFFSETS, strict=True):
                show(axes, image, f"b = {b}")
            grid[2 * channel + line, 0].set_ylabel(f"channel {channel}, t = {name}", fontsize=7)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "offset.png", dpi=110)
    here = ", ".join(f"{row['left half']:.2f}" for row in rows)
    there = ", ".join(f"{row['right half']:.2f}" for row in rows)
    strongest = max(rows, key=lambda row: abs(row["left half"]))
    claims = [
        claim("an offset at T moves that channel of the image, the same way", here,
              all(row["left half"] > 0 for row in rows)),
        claim("more than an offset at 0 does (slope 1)",
              f"{here} (1/α(T) = {1 / max(alpha, 1e-9):.1f})",
              all(row["left half"] > 1 for row in rows)),
        claim("mostly where it was added", f"{here} against {there}",
              abs(strongest["left half"]) > 2 * abs(strongest["right half"])),
    ]  # fmt: skip
    conclude(args, rows, claims)


if __name__ == "__main__":
    main()
