"""The paths of four rules between two points of the plane.

    python scripts/reproduce/paths.py

Landolsi & Kahl, arXiv 2505.07481, Fig. 2: two points of different norms near the circle √L, more
than a right angle apart. Paths are drawn over √L. No backbone is needed.
"""

import math

import torch
from claims import options, record
from matplotlib.figure import Figure
from torch import Tensor
from works import exact

from augment.centroid import Rule

NORMS = {"lin": "LIN", "fix": "FIX", "raw_slerp": "SLERP", "nin": "NIN"}
ENDS = torch.tensor([[1.25, 0.1], [-0.6, 0.7]], dtype=torch.float64)
STOPS = 1001


def path_of(norm: str) -> Tensor:
    """Return points (STOPS, 2) from one end to the other, by weights (1 − γ, γ)."""
    place = torch.linspace(0, 1, STOPS, dtype=torch.float64)
    points = (math.sqrt(2) * ENDS)[:, None, None].expand(STOPS, -1, -1, -1, -1)
    found = Rule.parse(f"{norm}/0")(points, torch.stack([1 - place, place], 1))
    return found[:, 0, 0] / math.sqrt(2)


def main() -> None:
    """Draw the paths, and measure their norms and their ends."""
    args = options("Paths of the rules in 2-D: arXiv 2505.07481, Fig. 2.", "paths").parse_args()
    paths = {norm: path_of(norm) for norm in NORMS}
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    for norm, path in paths.items():
        axes.plot(*path.T, label=NORMS[norm])
    angle = torch.linspace(0, 2 * math.pi, 200)
    axes.plot(angle.cos(), angle.sin(), ":", color="grey")
    axes.plot(*ENDS.T, "ko")
    axes.plot(0, 0, "k+")
    axes.set(aspect="equal")
    axes.legend(frameon=False, fontsize=8)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "paths.png", dpi=120)
    short, long = sorted(ENDS.norm(dim=1).tolist())
    low, high, off = {}, {}, {}
    for norm, path in paths.items():
        radii = path.norm(dim=1)
        low[norm], high[norm] = radii.min().item() / short, radii.max().item() / long
        off[norm] = (path[[0, -1]] - ENDS).norm(dim=1).max().item()
    rows = [
        {"rule": name, "least norm / smaller input": low[norm],
         "largest norm / larger input": high[norm], "distance from its inputs": off[norm]}
        for norm, name in NORMS.items()
    ]  # fmt: skip
    found = {
        "fig2-lin": {"": exact(low["lin"])},
        "fig2-fix": {"": exact(off["fix"])},
        "fig2-slerp": {"": exact(high["raw_slerp"] - 1)},
        "fig2-nin": {"distance": exact(off["nin"]), "overshoot": exact(high["nin"] - 1)},
    }
    caption = "Paths of four rules around the circle"
    record(args, "Paths between two points of the plane", rows, found, paths=caption)


if __name__ == "__main__":
    main()
