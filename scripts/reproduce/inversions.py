"""How well inversions reconstruct images, and whether a better one cures the degeneration.

    python scripts/reproduce/inversions.py --quick
    python scripts/reproduce/inversions.py

The table of Guo et al., *Smooth Diffusion*, arXiv 2312.04410 (MSE, LPIPS, SSIM, PSNR of DDIM and
null-text inversion at guidance 7.5, with the codec's own error for bound), and Fig. 10 and 11 of
Landolsi & Kahl, arXiv 2505.07481: centroids degenerate with many steps without guidance, and with
null-text, too. `bias` is the largest channel mean, of latents and of their centroids of N.
LPIPS takes weights that torchvision downloads; it is left out where it cannot be had.
"""

from typing import Any

import torch
from claims import claim, conclude, once, options
from degeneracy import largest_mean
from judge import open_judge, pictures, show
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.diffusion import Backbone, load_backbone
from augment.measure.reconstruction import reconstruction
from augment.plan.plan import Plan
from augment.report.evaluate import lpips_for
from augment.sources.fashion import COARSE
from augment.sources.prompts import class_prompts
from augment.synthesis.synthesizer import Synthesizer

RULES = ("fix/0", "fix/chm")


def plans(bank: LatentBank, whole: bool) -> list[Plan]:
    """Of every image alone, or of each class's images in equal parts."""
    found: list[Plan] = []
    for label, (name, ids) in enumerate(bank.members.items()):
        for members in [tuple(ids)] if whole else [(i,) for i in ids]:
            found.append(Plan.equal(label, name, members, len(found)))
    return found


def make(backbone: Backbone, bank: LatentBank) -> dict[str, Tensor]:
    """Every image sampled back, and the centroids of each class by two rules."""
    back = Synthesizer(backbone, bank, Rule.parse("lin/0")).images(plans(bank, whole=False))
    made = {"back": back, "latents": torch.cat([bank.latents(n) for n in bank.classes])}
    for rule in RULES:
        synthesizer = Synthesizer(backbone, bank, Rule.parse(rule))
        whole = plans(bank, whole=True)
        made[f"{rule} latents"] = torch.stack([synthesizer.centroid(plan) for plan in whole])
        made[f"{rule} images"] = synthesizer.images(whole)
    return made


def errors(images: Tensor, others: Tensor, lpips: Any) -> dict[str, float]:
    """Means over the images."""
    found = {key: value.mean().item() for key, value in reconstruction(images, others).items()}
    return found | ({"lpips": lpips(images, others).mean().item()} if lpips else {})


def main() -> None:
    """Invert in several ways, sample back, mix, measure, draw, judge."""
    args = options("Inversions: arXiv 2312.04410 and 2505.07481, Fig. 10, 11.", "inversions")
    args = args.parse_args()
    many, null_steps, per_class = (200, 20, 8) if args.quick else (1000, 50, 32)
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, per_class)
    judge = open_judge(args, backbone, reference)
    texts = class_prompts(source.classes, "a photo of a {name}")
    prompts = COARSE if args.backbone == "tiny" else texts
    ways: dict[str, tuple[str, int, float]] = {
        "DDIM 10": ("ddim", 10, 1.0),
        "DDIM 50": ("ddim", 50, 1.0),
        f"DDIM {many}": ("ddim", many, 1.0),
        f"DDIM {null_steps}, guidance 7.5": ("ddim", null_steps, 7.5),
        f"null-text {null_steps}, guidance 7.5": ("null_text", null_steps, 7.5),
        "forward_start 25": ("forward_start", 25, 1.0),
    }
    form = backbone.channels, backbone.resolution
    real = torch.stack([source.load(i, *form) for i, _ in source.samples])
    bound = backbone.decode(backbone.encode(real)).cpu()
    lpips = lpips_for(backbone)
    rows: list[dict[str, Any]] = [{"inversion": "codec alone", **errors(real, bound, lpips)}]
    count, made = len(source.classes), {}
    tag = backbone.fingerprint["weights"][:8]
    for name, (method, steps, guidance) in tqdm(ways.items(), "inversions"):
        stem = f"{tag}-{method}-{steps}-{guidance:g}-{per_class}"
        bank = fill_bank(
            args.out / f"bank-{stem}", backbone, source, prompts, method, steps, guidance, stored=()
        )
        cell = made[name] = once(
            args.out / f"{stem}.safetensors", lambda bank=bank: make(backbone, bank)
        )
        row: dict[str, Any] = {"inversion": name, **errors(real, cell["back"], lpips)}
        # of latents in the order of classes, so that a class's are a column
        grouped = cell["latents"].unflatten(0, (count, -1)).transpose(0, 1).flatten(0, 1)
        row["bias"] = largest_mean(grouped, count)
        for rule in RULES:
            row[f"bias, {rule}"] = largest_mean(cell[f"{rule} latents"], count)
            found = judge.assess(cell[f"{rule} images"], torch.arange(count))
            row[f"distance, {rule}"] = found["distance"].mean().item()
        rows.append(row)
    rows[0] = {**dict.fromkeys(rows[1]), **rows[0]}
    figure = Figure(figsize=(1.2 * len(ways), 5.6), layout="constrained")
    grid = figure.subplots(5, len(ways))
    label = 5 % count
    for column, (name, cell) in zip(grid.T, made.items(), strict=True):
        shots = [real[label * per_class], cell["back"][label * per_class]]
        shots += [cell[f"{rule} images"][label] for rule in RULES]
        shots += [cell["fix/0 images"][0]]
        for axes, image in zip(column, shots, strict=True):
            show(axes, image)
        column[0].set_title(name, fontsize=6)
    for axes, name in zip(grid[:, 0], ("real", "back", *RULES, "fix/0"), strict=True):
        axes.set_ylabel(name, fontsize=8)
    figure.savefig(args.out / "inversions.png", dpi=120)
    by = {row["inversion"]: row for row in rows}
    ddim, null = by[f"DDIM {null_steps}, guidance 7.5"], by[f"null-text {null_steps}, guidance 7.5"]
    claims = [
        claim("null-text mends DDIM's way back under guidance (Smooth Diffusion, 13.97 → 25.63 dB)",
              f"{ddim['psnr']:.1f} → {null['psnr']:.1f} dB", null["psnr"] > ddim["psnr"] + 3),
        claim("and comes near the codec's bound (25.63 of 25.98 dB)",
              f"{null['psnr']:.1f} of {min(rows[0]['psnr'], 120):.1f} dB",
              null["psnr"] > rows[0]["psnr"] - 1),
        *(
            claim(f"{name}: fix/0 lengthens the bias, fix/chm does not (Fig. 10, 11)",
                  f"{row['bias']:.3f} → {row['bias, fix/0']:.3f}, {row['bias, fix/chm']:.3f}",
                  row["bias, fix/0"] > 1.3 * row["bias"] > row["bias, fix/chm"])
            for name, row in by.items() if row["bias"]
        ),
    ]  # fmt: skip
    conclude(args, rows, claims)


if __name__ == "__main__":
    main()
