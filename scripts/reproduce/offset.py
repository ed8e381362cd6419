"""What an offset of two channels does, at the noisiest level and in the clean latent.

    python scripts/reproduce/offset.py --quick
    python scripts/reproduce/offset.py

Landolsi & Kahl, arXiv 2505.07481, Fig. 6: in the top quarter of a latent, channel 0 is lowered by b
and channel 1 raised by b, so that the mean over channels stays; once at t = T before sampling, once
at t = 0 before decoding, with the same noises. Measured is the mean |change| of pixels, in that
quarter and elsewhere.
"""

from claims import options, record, sized
from judge import mean, show
from matplotlib.figure import Figure
from works import exact

from augment.core.rng import normal, rng
from augment.diffusion import load_backbone
from augment.measure.relations import offset_response

OFFSETS = (0.1, 0.2, 0.4, 0.8)


def main() -> None:
    """Shift, sample, measure, draw, judge."""
    parser = options("A channel offset at T and at 0: arXiv 2505.07481, Fig. 6.", "offset")
    args = parser.parse_args()
    count, steps = sized(args, (2, 2), (16, 12), (64, 50))
    backbone = load_backbone(args.backbone)
    noises = normal(rng(0, "noise"), count, *backbone.latent_shape)
    late, early = (
        offset_response(backbone, noises, OFFSETS, at=at, steps=steps) for at in ("T", "0")
    )
    figure = Figure(figsize=(1.6 * (len(OFFSETS) + 1), 3.4), layout="constrained")
    grid = figure.subplots(2, len(OFFSETS) + 1)
    for line, response, name in zip(grid, (late, early), ("T", "0"), strict=True):
        for axes, image, b in zip(line, response.images, (0.0, *OFFSETS), strict=True):
            show(axes, image, f"b = {b}")
        line[0].set_ylabel(f"t = {name}")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "offset.png", dpi=110)
    rows = [
        {"b": f"{b:g}", "inside, at T": late.inside[k].mean().item(),
         "inside, at 0": early.inside[k].mean().item(),
         "elsewhere, at T": late.outside[k].mean().item(),
         "elsewhere, at 0": early.outside[k].mean().item()}
        for k, b in enumerate(OFFSETS)
    ]  # fmt: skip
    found = {
        "fig6-0": {"": exact(early.outside.max().item())},
        "fig6-T": {
            f"b = {b:g}": mean(late.inside[k] / early.inside[k] - 1) for k, b in enumerate(OFFSETS)
        },
        "fig6-out": {f"b = {b:g}": mean(late.outside[k]) for k, b in enumerate(OFFSETS)},
    }
    title = f"mean |change| of pixels by an offset b; {count} noises, DDIM {steps}"
    record(args, title, rows, found, offset="An offset at T and at 0")


if __name__ == "__main__":
    main()
