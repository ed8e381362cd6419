"""The paths of the rules between two points, in two dimensions.

    python scripts/reproduce/paths.py

Landolsi & Kahl, arXiv 2505.07481, Fig. 2: the path of each norm rule between two points of
different norms. On the left they have no common mean. In the middle they have one that is ignored
(split 0), so rules that restore a norm measure it from the origin. On the right it is taken out
first (split mu, with the true mean), and the paths go around it. No backbone is needed.
"""

import math
from typing import Any

import torch
from claims import claim, conclude, options
from matplotlib.figure import Figure
from torch import Tensor

from augment.centroid import Rule

NORMS = ("lin", "fix", "nin", "vp", "fade", "slerp")
ENDS = torch.tensor([[1.15, 0.1], [-0.35, 1.0]])
MEAN = torch.tensor([0.9, 0.5])
STOPS = 101


def path_of(norm: str, split: str, shift: Tensor) -> Tensor:
    """Return points (STOPS, 2) from one end to the other, by weights (1 − γ, γ)."""
    place = torch.linspace(0, 1, STOPS)
    points = (math.sqrt(2) * (ENDS + shift))[:, None, None].expand(STOPS, -1, -1, -1, -1)
    mu = (math.sqrt(2) * shift)[None, None]
    rule = Rule.parse(f"{norm}/{split}")
    found = rule(points, torch.stack([1 - place, place], 1), mu if split == "mu" else None)
    return found[:, 0, 0] / math.sqrt(2)


def main() -> None:
    """Draw the paths, and measure their distances from the centre of the points."""
    args = options("Paths of the rules in 2-D: arXiv 2505.07481, Fig. 2.", "paths").parse_args()
    zero = torch.zeros(2)
    panels = (("no common mean", "0", zero), ("common mean, split 0", "0", MEAN),
              ("common mean taken out, split mu", "mu", MEAN))  # fmt: skip
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, str], Tensor] = {}
    for axes, (title, split, shift) in zip(figure.subplots(1, 3), panels, strict=True):
        for norm in NORMS:
            path = path_of(norm, split, shift)
            axes.plot(*path.T, label=norm)
            radii = found[title, norm] = (path - shift).norm(dim=1)
            row = {"panel": title, "rule": f"{norm}/{split}"}
            rows.append(row | {"least radius": radii.min().item(), "most": radii.max().item()})
        axes.plot(*(ENDS + shift).T, "ko")
        angle = torch.linspace(0, 2 * math.pi, 200)
        axes.plot(*(torch.stack([angle.cos(), angle.sin()]) + shift[:, None]), ":", color="grey")
        axes.plot(0, 0, "k+")
        axes.set(title=title, aspect="equal")
    axes.legend(frameon=False, fontsize=8)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "paths.png", dpi=120)
    plain, biased, adjusted = (title for title, _, _ in panels)
    least = {norm: found[plain, norm].min().item() for norm in NORMS}
    lengths = ENDS.norm(dim=1)
    ends = found[plain, "nin"][[0, -1]]
    same = max((found[adjusted, n] - found[plain, n]).abs().max().item() for n in NORMS)
    off = (found[biased, "fix"] - 1).abs().max().item()
    claims = [
        claim("lin cuts through, fix stays on the circle",
              f"{least['lin']:.2f}, {least['fix']:.2f}",
              least["lin"] < 0.9 and abs(least["fix"] - 1) < 1e-5),
        claim("nin begins and ends in the points", " and ".join(f"{v:.2f}" for v in ends),
              bool((ends - lengths).abs().max() < 1e-5)),
        claim("with a common mean fix leaves the circle around it", f"by {off:.2f}", off > 0.1),
        claim("with the mean taken out all paths are those without one", f"to {same:.0e}",
              same < 1e-5),
    ]  # fmt: skip
    conclude(args, rows, claims)


if __name__ == "__main__":
    main()
