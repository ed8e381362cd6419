"""How noises, inverted latents and samples are related.

    python scripts/reproduce/relations.py --quick      # 10 and 20 steps
    python scripts/reproduce/relations.py              # 10, 100 and 1000 steps, more samples

Staniszewski et al., *There and Back Again*, arXiv 2410.23530. Noises are sampled by DDIM, and the
samples inverted in as many steps by the published DDIM inversion, by ours, and by `forward_start`.
Table 1: the 10 largest correlations of 8×8 patches. Assignment by L2: whether the noise nearest to
a sample is its own (x⁰ → x^T), and the sample nearest to a noise (x^T → x⁰), of rows as they are,
less the mean of their set, of fewer samples, and by cosine of these. Trajectory: at which share of
its steps sampling is nearest to the inverted latent, and how near it comes to the segment from
noise to latent.
"""

from itertools import pairwise
from typing import Any

import torch
from claims import once, options, record, sized
from judge import gain, load_all, mean, pictures, share
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from works import Interval

from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.backbone import denoiser
from augment.diffusion.solver import SOLVERS
from augment.inversion import inverter
from augment.measure.relations import approach, assignment, top_correlations
from augment.networks import unit
from augment.sources import Source

BATCH = 64
FEW = 64  # samples of an assignment, beside all


def last_mean(backbone: Backbone, source: Source) -> Tensor:
    """Return the channel means of noise at the last level in training: the rest of the images."""
    clean = backbone.encode(load_all(source, backbone)).cpu().mean((0, 2, 3))
    return backbone.process.alpha_sigma(1)[0] * clean.view(-1, 1, 1)


def there_and_back(backbone: Backbone, noises: Tensor, steps: int) -> dict[str, Tensor]:
    """Sample noises and invert the samples in three ways; keep twenty points of the path."""
    levels = backbone.process.levels(steps)[::-1]
    stops = sorted({round(k * steps / 20) for k in range(21)})
    ways_back = {
        "published DDIM": inverter("published_ddim", steps=steps),
        "DDIM": inverter("ddim", steps=steps),
        "forward_start": inverter("forward_start", steps=max(steps // 2, 5)),
    }
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
            for name, run in ways_back.items():
                found[name] = run(denoise, latent, seeds=seeds[rows])["latents"]
            parts.append({key: value.cpu() for key, value in found.items()})
            bar.update(len(texts))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def row(noises: Tensor, made: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Return a row of the table."""
    clean = made["samples"]
    found: dict[str, Any] = {"steps": str(steps), "noise": top(noises)}
    found |= {name: top(made[name]) for name in WAYS}
    found["sample"] = top(clean)
    for name, pair in (("x⁰ → x^T", (clean, noises)), ("x^T → x⁰", (noises, clean))):
        for centred in (False, True):
            key = f"{name}{', centred' if centred else ''}, %"
            found[key] = 100 * assignment(*pair, centred).double().mean().item()
        groups = zip(*(x.split(min(FEW, len(x))) for x in pair), strict=True)
        few = torch.cat([assignment(*some, centred=True) for some in groups])
        found[f"{name}, centred, of {FEW}, %"] = 100 * few.double().mean().item()
        rows = [unit((x - x.mean(0)).flatten(1)) for x in pair]
        found[f"{name}, cosine, %"] = 100 * assignment(*rows).double().mean().item()
    found["nearest at, %"] = 100 * nearest(made, "published DDIM").mean().item()
    return found


WAYS = ("published DDIM", "DDIM", "forward_start")


def top(tensors: Tensor) -> float:
    """Return the mean over patches of the 10 largest correlations."""
    return top_correlations(tensors).mean().item()


def nearest(made: dict[str, Tensor], name: str) -> Tensor:
    """Return the share of its steps at which each sample's trajectory is nearest to its latent."""
    ways = made["ways"]
    far = (ways - made[name][:, None]).flatten(2).norm(dim=2)
    return far.argmin(1).double() / (ways.shape[1] - 1)


def draw(noises: Tensor, made: dict[int, dict[str, Tensor]], path: Any) -> None:
    """Draw distances from points of the path to points between noise and latent, by steps."""
    figure = Figure(figsize=(4 * len(made), 3.6), layout="constrained")
    for axes, (steps, parts) in zip(
        figure.subplots(1, len(made), squeeze=False)[0], made.items(), strict=True
    ):
        distance, places = approach(parts["ways"].transpose(0, 1), noises, parts["published DDIM"])
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
    counts, samples = sized(args, ((2, 3), 8), ((10, 20), 320), ((10, 100, 1000), 1024))
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
    title = f"top-10 correlations, assignment by L2 and trajectory; {samples} samples by DDIM"
    found = decide(noises, made)
    record(args, title, rows, found, relations="Distance of sampling from noise to latent")


def decide(noises: Tensor, made: dict[int, dict[str, Tensor]]) -> dict[str, dict[str, Interval]]:
    """Return what decides the claims."""
    count, many = len(noises), made[max(made)]

    def apart(more: Tensor, less: Tensor) -> Interval:
        value, groups = top(more) - top(less), torch.arange(count) % 8
        left = [top(more[groups != k]) - top(less[groups != k]) for k in range(8)]
        spread = torch.tensor(left, dtype=torch.float64)  # of the jackknife by groups
        half = 2.36 * (7 / 8 * (spread - spread.mean()).square().sum().item()) ** 0.5
        return Interval(value - half, value, value + half)

    hits = {
        steps: assignment(noises, parts["samples"], centred=True).double()
        for steps, parts in made.items()
    }
    return {
        "st-correlation": {name: apart(many[name], noises) for name in WAYS[:2]},
        "st-sample": {name: apart(many["samples"], many[name]) for name in WAYS[:2]},
        "st-x0": {
            f"{steps} steps": share(assignment(parts["samples"], noises, centred=True))
            for steps, parts in made.items()
        },
        "st-xT": {"": gain(hits[max(made)], hits[min(made)])},
        "st-way": {
            f"{steps} steps": mean(nearest(parts, WAYS[0])) for steps, parts in made.items()
        },
    }


if __name__ == "__main__":
    main()
