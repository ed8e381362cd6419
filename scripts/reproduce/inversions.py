"""Compare inversions: reconstruction, whiteness of the latents, and what becomes of centroids.

    python scripts/reproduce/inversions.py --quick
    python scripts/reproduce/inversions.py

The table of Guo et al., *Smooth Diffusion*, arXiv 2312.04410 (MSE, LPIPS, SSIM, PSNR of DDIM and
null-text inversion at guidance 7.5, with the codec's own error for bound), and Fig. 10 and 11 of
Landolsi & Kahl, arXiv 2505.07481: centroids degenerate with many steps without guidance, and with
null-text, too. The other inversions of `augment.inversion` run at about 50 network evaluations.

`bias` is the largest channel mean, of latents and of their centroids of all images of a class;
`correlation` is that of neighbouring pixels. `kept` and `FID` are of centroids of N images in equal
parts by fade/chm, the same ones in every row: the share that the judge finds in their class, and
the distance of their features to those of other real images. LPIPS takes weights that torchvision
downloads; it is left out where it cannot be had.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from claims import claim, conclude, once, options
from degeneracy import largest_mean
from judge import load_all, open_judge, pictures, show
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment import Mixing, Planner, Rule, Synthesizer, load_backbone
from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.diffusion import Backbone
from augment.inversion import inverter
from augment.measure.reconstruction import reconstruction
from augment.plan.plan import Plan
from augment.report.evaluate import lpips_for
from augment.sources.fashion import COARSE
from augment.sources.prompts import class_prompts

Cells = dict[str, dict[str, Tensor]]
RULES = ("fix/0", "fix/chm")
COUNTS = (2, 8)  # members of the centroids that are judged


def whole(bank: LatentBank) -> list[Plan]:
    """Return the plans of each class's images in equal parts."""
    members = enumerate(bank.members.items())
    return [Plan.equal(label, name, ids, label) for label, (name, ids) in members]


def make(backbone: Backbone, bank: LatentBank, draws: int) -> dict[str, Tensor]:
    """Sample every image back, and centroids of each class."""
    alone = [
        Plan.equal(label, name, (i,), row)
        for label, (name, ids) in enumerate(bank.members.items())
        for row, i in enumerate(ids)
    ]
    made = {
        "back": Synthesizer(backbone, bank, Rule.parse("lin/0")).images(alone),
        "latents": torch.cat([bank.latents(name) for name in bank.classes]),
    }
    for name in RULES:
        synthesizer = Synthesizer(backbone, bank, Rule.parse(name))
        made[f"{name} latents"] = synthesizer.mix(whole(bank)).centroids
        made[f"{name} images"] = synthesizer.images(whole(bank))
    for count in COUNTS:
        planner = Planner(bank.members, Mixing(alpha="inf", members=count))
        plans = [planner(0, index) for index in range(draws * len(bank.classes))]
        made[f"{count} members"] = Synthesizer(backbone, bank).images(plans)
    return made


def errors(images: Tensor, others: Tensor, lpips: Any) -> dict[str, float]:
    """Return means over the images."""
    found = {key: value.mean().item() for key, value in reconstruction(images, others).items()}
    return found | ({"lpips": lpips(images, others).mean().item()} if lpips else {})


def main() -> None:
    """Invert in several ways, sample back, mix, measure, draw, judge."""
    args = options("Inversions: arXiv 2312.04410 and 2505.07481, Fig. 10, 11.", "inversions")
    args = args.parse_args()
    many, null_steps, per_class, draws = (200, 20, 8, 2) if args.quick else (1000, 50, 32, 16)
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, per_class)
    judge = open_judge(args, backbone, reference)
    texts = class_prompts(source.classes, "a photo of a {name}")
    known = {name: COARSE[name] for name in source.classes if name in COARSE}
    prompts = known if args.backbone == "tiny" else texts
    ways: dict[str, tuple[str, int, float]] = {
        "DDIM 10": ("ddim", 10, 1.0),
        "DDIM 50": ("ddim", 50, 1.0),
        f"DDIM {many}": ("ddim", many, 1.0),
        f"DDIM {null_steps}, guidance 7.5": ("ddim", null_steps, 7.5),
        f"null-text {null_steps}, guidance 7.5": ("null_text", null_steps, 7.5),
        "fixed_point 25": ("fixed_point", 25, 1.0),
        "midpoint 25": ("midpoint", 25, 1.0),
        "fireflow 50": ("fireflow", 50, 1.0),
        "fireflow 25": ("fireflow", 25, 1.0),
        "forward_start 25": ("forward_start", 25, 1.0),
    }
    real = load_all(source, backbone)
    bound = backbone.decode(backbone.encode(real)).cpu()
    lpips = lpips_for(backbone)
    rows: list[dict[str, Any]] = [{"inversion": "codec alone", **errors(real, bound, lpips)}]
    made: Cells = {}
    count = len(source.classes)
    tag = backbone.fingerprint["weights"][:8]
    for name, (method, steps, guidance) in tqdm(ways.items(), "inversions"):
        stem = f"{tag}-{method}-{steps}-{guidance:g}-{per_class}"
        bank = fill_bank(
            args.out / f"bank-{stem}",
            backbone,
            source,
            prompts,
            method,
            steps=steps,
            guidance=guidance,
            stored=(),
        )
        cell = made[name] = once(
            args.out / f"{stem}-{draws}.safetensors", lambda bank=bank: make(backbone, bank, draws)
        )
        row: dict[str, Any] = {"inversion": name, **errors(real, cell["back"], lpips)}
        row["evaluations"] = inverter(method, steps=steps).evaluations
        # of latents in the order of classes, so that a class's are a column
        grouped = cell["latents"].unflatten(0, (count, -1)).transpose(0, 1).flatten(0, 1)
        statistics = [bank.health(name).statistics for name in bank.classes]
        row["norm"] = fmean(s.norm for s in statistics)
        row["correlation"] = fmean(s.horizontal for s in statistics)
        row["bias"] = largest_mean(grouped, count)
        for rule in RULES:
            row[f"bias, {rule}"] = largest_mean(cell[f"{rule} latents"], count)
            found = judge.assess(cell[f"{rule} images"], torch.arange(count))
            row[f"distance, {rule}"] = found["distance"].mean().item()
        for members in COUNTS:
            images = cell[f"{members} members"]
            found = judge.assess(images, torch.arange(len(images)) % count)
            row[f"kept, N = {members}"] = found["kept"].mean().item()
            row[f"FID, N = {members}"] = judge.fid(found["features"])
        rows.append(row)
    rows[0] = {**dict.fromkeys(rows[1]), **rows[0]}
    draw(args.out / "inversions.png", made, real, 5 % count, per_class)
    by = {row["inversion"]: row for row in rows}
    ddim, null = by[f"DDIM {null_steps}, guidance 7.5"], by[f"null-text {null_steps}, guidance 7.5"]
    claims = [
        claim(
            "null-text repairs DDIM's way back under guidance (Smooth Diffusion, 13.97 → 25.63 dB)",
            f"{ddim['psnr']:.1f} → {null['psnr']:.1f} dB",
            null["psnr"] > ddim["psnr"] + 3,
        ),
        claim(
            "and comes near the codec's bound (25.63 of 25.98 dB)",
            f"{null['psnr']:.1f} of {min(rows[0]['psnr'], 120):.1f} dB",
            null["psnr"] > rows[0]["psnr"] - 1,
        ),
        *(
            claim(
                f"{name}: fix/0 lengthens the bias, fix/chm does not (Fig. 10, 11)",
                f"{row['bias']:.3f} → {row['bias, fix/0']:.3f}, {row['bias, fix/chm']:.3f}",
                row["bias, fix/0"] > 1.3 * row["bias"] > row["bias, fix/chm"],
            )
            for name, row in by.items()
            if row["bias"]
        ),
    ]
    conclude(args, rows, claims)


def draw(path: Path, made: Cells, real: Tensor, label: int, size: int) -> None:
    """Draw the first image of a class sampled back, and its centroids, for each inversion."""
    figure = Figure(figsize=(1.2 * len(made), 5.6), layout="constrained")
    grid = figure.subplots(5, len(made))
    for column, (name, cell) in zip(grid.T, made.items(), strict=True):
        shots = [real[label * size], cell["back"][label * size]]
        shots += [cell[f"{rule} images"][label] for rule in RULES]
        shots += [cell["fix/0 images"][0]]
        for axes, image in zip(column, shots, strict=True):
            show(axes, image)
        column[0].set_title(name, fontsize=6)
    for axes, name in zip(grid[:, 0], ("real", "back", *RULES, "fix/0"), strict=True):
        axes.set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
