"""Compare the inversions on the exact Gaussian backbone and on ``tiny``: which latents mix best?

    python scripts/compare_inversions.py            # took 25 minutes on one core

On images of Fashion-MNIST's *training* split, for the default is chosen by these tables: 24 a class
to invert, at about 50 network evaluations each. *Back* is the PSNR of images sampled by the
inversion's own solver with as many steps; *left* is the share of the mean clean latent of a class
in its mean inverted one; *blocks* is the mean |correlation| of pixels in 8×8 blocks (noise has the
value printed). Centroids mix N of a class in equal parts by fade/chm, the same ones in every row;
an oracle (the embedded network `fashion`) says whether the class was kept, and its features
give the FID to other training images. Finished rows stay in --out; go on at any time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import CLASSES, load_split
from torch import Tensor
from tqdm import tqdm

from augment import Rule, load_backbone, sample
from augment.core.files import write_json
from augment.core.rng import normal, rng
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.diffusion.process import Flow, VariancePreserving
from augment.inversion import inverted, inverter
from augment.measure.features import frechet_distance
from augment.networks import in_batches
from augment.networks.fashion import fashion_net
from augment.sources.fashion import COARSE
from augment.sources.images import prepare

PER_CLASS, DRAWS, COUNTS, REFERENCE = 24, 16, (2, 8, 16), 200
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("ddim", {"steps": 50}),
    ("fixed_point", {"steps": 50, "iterations": 1}),
    ("fixed_point", {"steps": 25, "iterations": 2}),
    ("forward_start", {"steps": 25}),
    ("forward_start", {"steps": 50}),
    ("forward_start", {"steps": 50, "start": 0.1}),
    ("midpoint", {"steps": 25}),
    ("fireflow", {"steps": 50}),
    ("fireflow", {"steps": 25}),
]
SAMPLERS = (("ddim", 50), ("midpoint", 25), ("fireflow", 50), ("fireflow", 25), ("fireflow", 10),
            ("dpm++", 20))  # fmt: skip
FOLLOWED = (("ddim", {"steps": 50}), ("fixed_point", {"steps": 25, "iterations": 2}),
            ("midpoint", {"steps": 25}), ("fireflow", {"steps": 50}),
            ("forward_start", {"steps": 25}))  # fmt: skip
NOISE = (("ddim", 10), ("ddim", 20), ("ddim", 50), ("dpm++", 10), ("dpm++", 20), ("midpoint", 10),
         ("fireflow", 10), ("fireflow", 25), ("fireflow", 50))  # fmt: skip
GUIDANCE = (2.0, 7.5)


def standard_error(values: Tensor) -> float:
    """Of the mean of (draws, classes), with the classes taken as given."""
    return ((values.var(0) / len(values)).sum().sqrt() / values.shape[1]).item()


def psnr(images: Tensor, others: Tensor) -> float:
    """Mean over images, dB."""
    return -10 * (images - others).square().mean((1, 2, 3)).log10().mean().item()


def blocks(latents: Tensor) -> float:
    """Mean |correlation| of two pixels of an 8×8 block, over images, channels and blocks."""
    centred = latents - latents.mean((-2, -1), keepdim=True)
    rows = centred.unfold(-2, 8, 8).unfold(-2, 8, 8).reshape(-1, 64)
    matrix = torch.corrcoef(rows.T).abs()
    return ((matrix.sum() - 64) / (64 * 63)).item()


class Bench:
    """The images, the backbone and the judge."""

    def __init__(self, out: Path) -> None:
        self.out, self.backbone = out, load_backbone("tiny")
        self.oracle = fashion_net(self.backbone.device)
        images, labels = load_split("train")
        order = torch.from_numpy(rng(0, "order").permutation(len(labels)))
        rows = [order[labels[order] == label] for label in range(len(CLASSES))]
        picked = torch.cat([members[:PER_CLASS] for members in rows])
        others = torch.cat([members[-REFERENCE:] for members in rows])
        self.images = prepare(images[picked], 1, 32)
        self.reference = in_batches(self.oracle.features, prepare(images[others], 1, 32))
        self.prompts = [COARSE[CLASSES[label]] for label in labels[picked].tolist()]
        self.clean = self.backbone.encode(self.images).unflatten(0, (len(CLASSES), PER_CLASS))

    def row(self, method: str, settings: dict[str, Any]) -> dict[str, Any]:
        """One line of the main table."""
        run = inverter(method, **settings)
        latents = inverted(run, self.backbone, self.images)["latents"]
        back = sample(self.backbone, latents, solver=run.solver, steps=run.steps)
        grouped = latents.unflatten(0, (len(CLASSES), PER_CLASS))
        left, clean = grouped.mean(1), self.clean.mean(1)
        found: dict[str, Any] = {
            "evaluations": run.evaluations,
            "back": psnr(back, self.images),
            "left": ((left * clean).sum() / clean.square().sum()).item(),
            "bias": grouped.mean((1, -2, -1)).abs().amax(1).mean().item(),
            "blocks": blocks(latents),
            "norm": latents.square().mean((1, 2, 3)).sqrt().mean().item(),
        }
        for count in COUNTS:
            found |= self.centroids(grouped, count, run.solver, run.steps)
        return found

    def centroids(self, grouped: Tensor, count: int, solver: str, steps: int) -> dict[str, Any]:
        """What becomes of centroids of ``count`` latents."""
        dice = rng(count, "plan")
        drawn = torch.stack([
            latents[torch.from_numpy(dice.permutation(PER_CLASS)[:count])]
            for _ in range(DRAWS) for latents in grouped
        ])  # fmt: skip
        mixed = Rule.parse("fade/chm")(drawn, torch.full((len(drawn), count), 1 / count))
        images = sample(self.backbone, mixed, solver=solver, steps=steps)
        features = in_batches(self.oracle.features, images)
        predicted = in_batches(self.oracle, images).argmax(1)
        hits = (predicted.view(DRAWS, -1) == torch.arange(len(CLASSES))).float()
        kept, error = 100 * hits.mean().item(), 100 * standard_error(hits)
        return {
            f"kept_{count}": [kept, error],
            f"fid_{count}": frechet_distance(features, self.reference),
        }

    def followed(self, method: str, settings: dict[str, Any]) -> dict[str, Any]:
        """What every sampler makes of one inversion's latents, dB."""
        latents = inverted(inverter(method, **settings), self.backbone, self.images)["latents"]
        return {
            f"{solver} {steps}": psnr(
                sample(self.backbone, latents, solver=solver, steps=steps), self.images
            )
            for solver, steps in SAMPLERS
        }

    def guided(self, method: str, settings: dict[str, Any], scale: float) -> dict[str, Any]:
        """PSNR of images inverted and sampled with the coarse prompts, and guidance only then."""
        run, few = inverter(method, **settings), slice(None, None, 6)
        images, prompts = self.images[few], self.prompts[few]
        guidance = scale if method == "null_text" else 1.0
        kept = inverted(run, self.backbone, images, prompts, guidance)
        nulls = kept["nulls"][kept["null_rows"]] if "nulls" in kept else None
        negative = prompts if method == "negative_prompt" else None
        back = sample(
            self.backbone, kept["latents"], prompts, run.solver, run.steps, scale,
            negative=negative, nulls=nulls,
        )  # fmt: skip
        return {"back": psnr(back, images)}

    def from_noise(self, scale: float) -> dict[str, Any]:
        """What each sampler makes of fresh noise, dB against 200 steps of the midpoint rule."""
        latents = normal(rng(0, "noise"), 32, *self.backbone.latent_shape)
        prompts = self.prompts[:: len(self.prompts) // 32][:32]
        goal = sample(self.backbone, latents, prompts, "midpoint", 200, scale)
        return {
            f"{solver} {steps}": psnr(
                sample(self.backbone, latents, prompts, solver, steps, scale), goal
            )
            for solver, steps in NOISE
        }

    def once(self, name: str, make: Any) -> dict[str, Any]:
        """A record, made if it is not there."""
        path = self.out / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text())


def gaussian_table() -> None:
    """Errors against the truth: the latent's, and the image's after the way back."""
    print("| inversion | process | evaluations | error of the latent | error of the round trip |")
    print("|---|---|---|---|---|")
    clean = 0.2 + 0.5 * normal(rng(0, "noise"), 16, 4, 16, 16)
    for method, settings in ROWS:
        for process in (VariancePreserving(), Flow(shift=3.0)):
            backbone = GaussianBackbone(mean=0.2, std=0.5, process=process)
            run, images = inverter(method, **settings), (clean + 1) / 2
            images = images.clamp(0, 1)
            latents = inverted(run, backbone, images)["latents"]
            truth = backbone.transport(backbone.encode(images))
            back = sample(backbone, latents, solver=run.solver, steps=run.steps)
            errors = [(latents - truth), 2 * (back - images)]
            told = " | ".join(f"{e.square().mean().sqrt():.4f}" for e in errors)
            name = "flow" if isinstance(process, Flow) else "ε"
            print(f"| {label(method, settings)} | {name} | {run.evaluations} | {told} |")


def label(method: str, settings: dict[str, Any]) -> str:
    """``fixed_point 25 (iterations 2)``."""
    rest = ", ".join(f"{k} {v}" for k, v in settings.items() if k != "steps")
    return f"{method} {settings['steps']}" + (f" ({rest})" if rest else "")


def main() -> None:
    """Measure, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/inversions"))
    args = parser.parse_args()
    gaussian_table()
    bench = Bench(args.out)
    noise = normal(rng(0, "noise"), *bench.clean.flatten(0, 1).shape)
    names = [label(*row) for row in ROWS]
    rows = {
        name: bench.once(name, lambda row=row: bench.row(*row))
        for name, row in zip(tqdm(names, "inversions"), ROWS, strict=True)
    }
    columns = "".join(f" kept, N = {n} | FID, N = {n} |" for n in COUNTS)
    print(f"\nblocks of white noise: {blocks(noise):.3f}\n")
    print(f"| inversion | evaluations | back, dB | left | bias | blocks | norm / √D |{columns}")
    print("|---" * (7 + 2 * len(COUNTS)) + "|")
    for name, row in rows.items():
        cells = [
            f"{row['back']:.1f}",
            *(f"{row[k]:.3f}" for k in ("left", "bias", "blocks", "norm")),
        ]
        for n in COUNTS:
            cells += ["{:.1f} ± {:.1f}".format(*row[f"kept_{n}"]), f"{row[f'fid_{n}']:.1f}"]
        print(f"| {name} | {row['evaluations']} | {' | '.join(cells)} |")
    print("\n| inverted by \\ sampled by | " + " | ".join(f"{s} {n}" for s, n in SAMPLERS) + " |")
    print("|---" * (1 + len(SAMPLERS)) + "|")
    for row in FOLLOWED:
        found = bench.once("then-" + label(*row), lambda row=row: bench.followed(*row))
        print(f"| {label(*row)} | " + " | ".join(f"{v:.1f}" for v in found.values()) + " |")
    print("\n| from noise, guidance | " + " | ".join(f"{s} {n}" for s, n in NOISE) + " |")
    print("|---" * (1 + len(NOISE)) + "|")
    for scale in (1.0, 3.0, 7.5):
        found = bench.once(f"noise-{scale}", lambda g=scale: bench.from_noise(g))
        print(f"| {scale} | " + " | ".join(f"{v:.1f}" for v in found.values()) + " |")
    print("\n| with prompts, guidance in sampling only | " + " | ".join(map(str, GUIDANCE)) + " |")
    print("|---" * (1 + len(GUIDANCE)) + "|")
    for method, settings in (
        ("ddim", {"steps": 50}), ("fireflow", {"steps": 50}), ("negative_prompt", {"steps": 50}),
        ("null_text", {"steps": 50}), ("null_text", {"steps": 50, "shared": True}),
    ):  # fmt: skip
        name = label(method, settings)
        found = [
            bench.once(f"guided-{name}-{g}", lambda g=g: bench.guided(method, settings, g))["back"]  # noqa: B023
            for g in GUIDANCE
        ]
        print(f"| {name} | " + " | ".join(f"{v:.1f}" for v in found) + " |")


if __name__ == "__main__":
    main()
