"""How noises, inverted latents and samples are related.

    python scripts/reproduce/relations.py --quick      # 10 and 50 steps
    python scripts/reproduce/relations.py              # 10, 100 and 1000 steps, more samples

Staniszewski et al., *There and Back Again*, arXiv 2410.23530. Noises are sampled by DDIM, and the
samples inverted by DDIM in as many steps, and by `forward_start` in place of its first steps.
Table 1: the 20 largest correlations of 8×8 patches. Assignment: whether the sample nearest to a
noise is its own, and the noise nearest to a sample. Fig. 5 of the first version: how near sampling
comes to each point of the segment from noise to latent.
"""

from itertools import pairwise
from typing import Any

import torch
from claims import claim, conclude, once, options
from judge import load_all, pictures
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.backbone import denoiser
from augment.diffusion.solver import SOLVERS
from augment.inversion import inverter
from augment.measure.relations import approach, assignment, top_correlations
from augment.sources import Source

BATCH = 64


def last_mean(backbone: Backbone, source: Source) -> Tensor:
    """Return the channel means of noise at the last level in training: the rest of the images."""
    clean = backbone.encode(load_all(source, backbone)).cpu().mean((0, 2, 3))
    return backbone.process.alpha_sigma(1)[0] * clean.view(-1, 1, 1)


def there_and_back(backbone: Backbone, noises: Tensor, steps: int) -> dict[str, Tensor]:
    """Sample noises and invert the samples in two ways; keep ten points of the path."""
    levels = backbone.process.levels(steps)[::-1]
    stops = sorted({round(k * steps / 10) for k in range(11)})
    ddim, ours = inverter("ddim", steps=steps), inverter("forward_start", steps=max(steps // 2, 5))
    parts: list[dict[str, Tensor]] = []
    seeds = list(range(len(noises)))
    with torch.no_grad(), tqdm(total=len(noises), desc=f"{steps} steps", unit="sample") as bar:
        for start in range(0, len(noises), BATCH):
            rows = slice(start, start + BATCH)
            texts = [""] * len(noises[rows])
            denoise = denoiser(backbone, texts)
            latent = noises[rows].to(backbone.device)
            ways = [latent]
            for first, last in pairwise(stops):
                latent = SOLVERS["ddim"](denoise, latent, levels[first : last + 1], lambda: None)
                ways.append(latent)
            found = {"samples": latent, "ways": torch.stack(ways, 1)}
            found["latents"] = ddim(denoise, latent)["latents"]
            found["forward"] = ours(denoise, latent, seeds=seeds[rows])["latents"]
            parts.append({key: value.cpu() for key, value in found.items()})
            bar.update(len(texts))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def row(noises: Tensor, made: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Return a row of the table."""
    flat = {"noise": noises, "DDIM": made["latents"], "forward": made["forward"]}
    flat["sample"] = made["samples"]
    found: dict[str, Any] = {"steps": steps}
    for name, tensors in flat.items():
        found[f"correlation, {name}"] = top_correlations(tensors).mean().item()
    clean = made["samples"]
    found["noise → sample"] = assignment(noises, clean)
    found["sample → noise"] = assignment(clean, noises)
    found["latent → noise"] = assignment(made["latents"], noises)
    for name, tensors in (("noise", noises), ("DDIM latent", made["latents"])):
        found[f"{name} to sample"] = (tensors - clean).flatten(1).norm(dim=1).mean().item()
    return found


def draw(noises: Tensor, made: dict[int, dict[str, Tensor]], path: Any) -> None:
    """Draw distances from points of the path to points between noise and latent, by steps."""
    figure = Figure(figsize=(4 * len(made), 3.6), layout="constrained")
    for axes, (steps, parts) in zip(
        figure.subplots(1, len(made), squeeze=False)[0], made.items(), strict=True
    ):
        distance, places = approach(parts["ways"].transpose(0, 1), noises, parts["latents"])
        image = axes.imshow(distance, aspect="auto", extent=(0, 1, 1, 0), cmap="viridis")
        axes.plot(places[distance.argmin(1)], torch.linspace(0, 1, len(distance)), "w.-")
        axes.set(title=f"{steps} steps", xlabel="noise → latent", ylabel="way of sampling")
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, draw, judge."""
    parser = options("Noises, latents and samples: arXiv 2410.23530.", "relations")
    args = parser.parse_args()
    backbone = load_backbone(args.backbone)
    counts, samples = ((10, 50), 96) if args.quick else ((10, 100, 1000), 256)
    shape = backbone.latent_shape
    noises = normal(rng(0, "noise"), samples, *shape) + last_mean(backbone, pictures(args, 8)[0])
    tag = f"{backbone.fingerprint['weights'][:8]}-{samples}"
    made = {
        steps: once(
            args.out / f"{tag}-{steps}.safetensors",
            lambda steps=steps: there_and_back(backbone, noises, steps),
        )
        for steps in counts
    }
    rows = [row(noises, made[steps], steps) for steps in counts]
    draw(noises, made, args.out / "relations.png")
    few, many = rows[0], rows[-1]
    listed = " / ".join(f"{many[f'correlation, {n}']:.3f}" for n in ("noise", "DDIM", "sample"))
    ours = f"{many['correlation, forward']:.3f}"
    white, left = many["correlation, noise"], many["correlation, DDIM"]
    between = white * 1.02 < left < many["correlation, sample"]
    claims = [
        claim("DDIM latents correlate more than noise, less than samples", listed, between),
        claim(
            "a forward start takes most of that away",
            f"{ours} of {listed}",
            many["correlation, forward"] - white < 0.5 * (left - white),
        ),
    ]
    for way in ("noise → sample", "sample → noise"):
        rates = few[way], many[way]
        noise = 2 * sum(p * (1 - p) / samples for p in rates) ** 0.5
        better = None if abs(rates[1] - rates[0]) <= noise else rates[1] > rates[0]
        here = f"{rates[0]:.2f} → {rates[1]:.2f} (chance {1 / samples:.3f})"
        claims.append(
            claim(f"{way}: the nearest is the right one, more so with more steps", here, better)
        )
    ends = many["DDIM latent to sample"], many["noise to sample"]
    here = f"{ends[0]:.1f} against {ends[1]:.1f}"
    claims.append(
        claim("latents are nearer to the sample than the noise was", here, ends[0] < ends[1])
    )
    conclude(args, rows, claims)


if __name__ == "__main__":
    main()
