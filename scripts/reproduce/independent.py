"""Centroids of independent noises do not degenerate; centroids of inverted latents do.

    python scripts/reproduce/independent.py --quick
    python scripts/reproduce/independent.py

Landolsi & Kahl, arXiv 2505.07481, Fig. 3 and 5, as we read them: noises are drawn and sampled, and
the samples inverted, unchanged or perturbed by independent noise in the pixels. Centroids of N of
each stage are made by fix/0 and by fix/chm. The noises are i.i.d., so a centroid that restores the
norm has the same distribution; the bias that inversion adds to all of them grows with N.
"""

import torch
from claims import claim, conclude, once, options
from judge import show
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment.centroid import Rule
from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.solver import sample
from augment.inversion import inverted, inverter

COUNTS = (2, 8, 32, 96)
STAGES = {"noise": None, "inverted": 0.0, "perturbed": 0.1}
RULES = ("fix/0", "fix/chm")


def stage(backbone: Backbone, noises: Tensor, sigma: float | None, steps: int) -> dict[str, Tensor]:
    """Return the latents of a stage."""
    if sigma is None:
        return {"latents": noises}
    images = sample(backbone, noises, None, "ddim", steps)
    perturbation = normal(rng(1, "noise"), *images.shape).to(images)
    images = (images + sigma * perturbation).clamp(0, 1)
    return {"latents": inverted(inverter("ddim", steps=steps), backbone, images)["latents"]}


def centroids(latents: Tensor, rule: str, count: int, draws: int) -> Tensor:
    """Mix ``count`` latents, drawn without replacement, in equal parts."""
    rows = [torch.from_numpy(rng(count, "plan", k).permutation(len(latents))) for k in range(draws)]
    points = torch.stack([latents[order[:count]] for order in rows])
    return Rule.parse(rule)(points, torch.full((draws, count), 1 / count))


def main() -> None:
    """Draw noises, invert, mix, sample, judge."""
    args = options("Centroids of i.i.d. latents: arXiv 2505.07481, Fig. 3, 5.", "independent")
    args = args.parse_args()
    total, draws, steps = (192, 8, 20) if args.quick else (384, 40, 50)
    backbone = load_backbone(args.backbone)
    noises = normal(rng(0, "noise"), total, *backbone.latent_shape)
    tag = f"{backbone.fingerprint['weights'][:8]}-{total}-{steps}"
    rows, biases, pictures = [], {}, {}
    for name, sigma in tqdm(STAGES.items(), "stages"):
        made = once(
            args.out / f"{tag}-{sigma}.safetensors",
            lambda sigma=sigma: stage(backbone, noises, sigma, steps),
        )["latents"]
        own = made.mean((0, -2, -1)).abs().max().item()
        for rule in RULES:
            mixed = {n: centroids(made, rule, n, draws) for n in COUNTS}
            found = {n: x.mean((0, -2, -1)).abs().max().item() for n, x in mixed.items()}
            biases[name, rule] = found
            row = {"stage": name, "rule": rule, "bias of one": own}
            rows.append(row | {f"N = {n}": value for n, value in found.items()})
            shown = torch.cat([x[:2] for x in mixed.values()])
            pictures[f"{name}, {rule}"] = sample(backbone, shown, None, "ddim", steps)
    figure = Figure(figsize=(2 * len(COUNTS) * 1.1, len(pictures) * 1.3), layout="constrained")
    for line, (name, images) in zip(
        figure.subplots(len(pictures), 2 * len(COUNTS)), pictures.items(), strict=True
    ):
        for number, axes in enumerate(line):
            show(axes, images[number], f"N = {COUNTS[number // 2]}")
        line[0].set_ylabel(name, fontsize=7)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "independent.png", dpi=120)
    chance = 3 / (draws * noises[0, 0].numel()) ** 0.5
    first, last = COUNTS[0], COUNTS[-1]
    grown = {key: (value[first], value[last]) for key, value in biases.items()}
    texts = {key: "{:.3f} → {:.3f}".format(*pair) for key, pair in grown.items()}
    claims = [
        claim(f"centroids of i.i.d. noises keep a mean of 0, N = {first} … {last}",
              f"{texts['noise', 'fix/0']} (chance: below {chance:.3f})",
              grown["noise", "fix/0"][1] < 2 * chance),
        *(
            claim(f"{name}: the bias of fix/0 grows with N", texts[name, "fix/0"],
                  grown[name, "fix/0"][1] > max(2 * grown[name, "fix/0"][0], 2 * chance))
            for name in list(STAGES)[1:]
        ),
        *(
            claim(f"{name}: that of fix/chm does not", texts[name, "fix/chm"],
                  grown[name, "fix/chm"][1] < 1.5 * grown[name, "fix/chm"][0] + chance)
            for name in list(STAGES)[1:]
        ),
    ]  # fmt: skip
    conclude(args, rows, claims)


if __name__ == "__main__":
    main()
