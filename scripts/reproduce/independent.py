"""Centroids of independent noises do not degenerate; centroids of their inverted samples do.

    python scripts/reproduce/independent.py --quick
    python scripts/reproduce/independent.py
    python scripts/reproduce/independent.py --quick --backbone tiny-flow.safetensors    # Fig. 5

Landolsi & Kahl, arXiv 2505.07481, Fig. 3 and §4.1: noises are sampled with a prompt, the images get
small Gaussian noise (0.01) in their pixels and are inverted with the same prompt, so that neither
class nor prompt can be at fault. Centroids of N of a prompt by fix/0 and fix/chm, of the noises and
of the inverted latents, are sampled with the prompt. Images are judged by their distance to the
mean feature of the samples of their prompt. The bias is the largest |channel mean| of centroids.
The inversion is the published one, and ours, which asks the network at the level it has.

Fig. 5 is the same with a flow, which leaves nothing of the clean latent at the noisiest level. Such
a model was trained on pure noise, so centroids of as many noises are what to compare with, and
the published inversion is the only other stage.
``scripts/train_tiny.py --flow`` trains one.
"""

from typing import Any

import torch
from claims import once, options, record, sized
from judge import ci95, gain, pictures, prompts_for, show
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment.centroid import Rule
from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.solver import sample
from augment.inversion import inverted, inverter
from augment.networks import feature_network, unit

STAGES = {
    "noise": None, "inverted, published DDIM": ("published_ddim", 0.01),
    "inverted, DDIM": ("ddim", 0.01), "inverted, DDIM, pixel noise 0.1": ("ddim", 0.1),
}  # fmt: skip
"""By stage the inversion, and the noise in the pixels. These stay in [0, 1]."""
RULES = ("fix/0", "fix/chm")


def stage(
    backbone: Backbone, noises: Tensor, images: Tensor, texts: list[str], name: str, steps: int
) -> dict[str, Tensor]:
    """Return the latents of a stage."""
    how = STAGES[name]
    if how is None:
        return {"latents": noises}
    inversion, sigma = how
    perturbed = images + sigma * normal(rng(1, "noise"), *images.shape).to(images)
    run = inverter(inversion, steps=steps)
    return {"latents": inverted(run, backbone, perturbed.clamp(0, 1), texts)["latents"]}


def mixed(latents: Tensor, rule: str, count: int, draws: int) -> Tensor:
    """Mix ``count`` latents, drawn without replacement, in equal parts."""
    rows = [torch.from_numpy(rng(count, "plan", k).permutation(len(latents))) for k in range(draws)]
    points = torch.stack([latents[order[:count]] for order in rows])
    return Rule.parse(rule)(points, torch.full((draws, count), 1 / count))


def main() -> None:
    """Draw noises, sample, invert, mix, sample, judge."""
    args = options("Centroids of inverted samples: arXiv 2505.07481, Fig. 3.", "independent")
    args = args.parse_args()
    each, counts, draws, steps = sized(
        args, (4, (2, 4), 2, 2), (48, (2, 8, 32), 8, 20), (128, (2, 8, 32, 96), 40, 50)
    )
    backbone = load_backbone(args.backbone)
    prompts = list(dict.fromkeys(prompts_for(backbone, pictures(args, 1)[0]).values()))
    texts = [text for text in prompts for _ in range(each)]
    how: dict[str, Any] = {"solver": "ddim", "steps": steps}
    noises = normal(rng(0, "noise"), len(texts), *backbone.latent_shape)
    tag = f"{backbone.fingerprint['weights'][:8]}-{len(texts)}-{steps}"
    images = once(
        args.out / f"{tag}.safetensors", lambda: {"i": sample(backbone, noises, texts, **how)}
    )["i"]
    network = feature_network(args.network, "", backbone.device)
    means = unit(unit(network(images)).unflatten(0, (len(prompts), each)).mean(1))
    flow, rows, far, shown = backbone.process.alpha_sigma(1)[0] == 0, [], {}, {}
    stages = list(STAGES)[: 2 if flow else None]
    for name in tqdm(stages, "stages"):
        latents = once(
            args.out / f"{tag}-{name.replace(' ', '-').replace(',', '')}.safetensors",
            lambda name=name: stage(backbone, noises, images, texts, name, steps),
        )["latents"].unflatten(0, (len(prompts), each))
        for rule in RULES:
            row = {"stage": name, "rule": rule}
            for count in counts:
                centroids = torch.stack([mixed(part, rule, count, draws) for part in latents])
                words = [text for text in prompts for _ in range(draws)]
                made = sample(backbone, centroids.flatten(0, 1), words, **how)
                cosines = unit(network(made)).unflatten(0, (len(prompts), draws))
                far[name, rule, count] = 1 - (cosines @ means[:, :, None])[..., 0].flatten()
                row[f"distance, N = {count}"] = ci95(far[name, rule, count])
                bias = centroids.mean((1, 3, 4)).abs().amax(1).mean().item()
                row[f"bias, N = {count}"] = f"{bias:.3f}"
                shown[name, rule, count] = made[::draws]
            rows.append(row)
    figure = Figure(
        figsize=(1.1 * len(counts) * len(RULES) + 2, 1 + len(stages)), layout="constrained"
    )
    columns = [(rule, count) for rule in RULES for count in counts]
    for line, name in zip(figure.subplots(len(stages), len(columns)), stages, strict=True):
        for axes, (rule, count) in zip(line, columns, strict=True):
            show(axes, shown[name, rule, count][0], f"{rule}, N = {count}")
        line[0].set_ylabel(name.replace(", ", "\n"), fontsize=7)
    args.out.mkdir(parents=True, exist_ok=True)
    last, drawn = counts[-1], "independent_flow" if flow else "independent"
    figure.savefig(args.out / f"{drawn}.png", dpi=110)
    name = "inverted, published DDIM"
    other = ("noise", "fix/0", last) if flow else (name, "fix/chm", last)
    found = {"fig5" if flow else "fig3": {name: gain(far[name, "fix/0", last], far[other])}}
    title = (
        f"distance of centroids of N to the mean of their prompt's samples; {each} noises of each "
        f"of {len(prompts)} prompts, DDIM {steps}, {draws} centroids a prompt"
    )
    record(args, title, rows, found, **{drawn: "Centroids of N by stage and rule"})


if __name__ == "__main__":
    main()
