"""Compare inversions: reconstruction, and centroids of latents of many steps and of null-text.

    python scripts/reproduce/inversions.py --quick
    python scripts/reproduce/inversions.py

MSE, LPIPS, SSIM and PSNR of DDIM and of null-text at guidance 7.5, and of the inversions of
`augment.inversion` without guidance; Table 2 of Guo et al. is in ``reconstruction.py``. Fig. 10 and
11 of Landolsi & Kahl, arXiv 2505.07481: centroids of N latents of one class by FIX, inverted in
very many DDIM steps without guidance, and by null-text with the null embeddings mixed linearly.
LPIPS takes weights that torchvision downloads; it is left out where it cannot be had.
"""

import math
from typing import Any

import torch
from claims import once, options, record, sized
from judge import gain, load_all, mean, open_judge, pictures, prompts_for, show
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
from augment.sources import Slice, Source

GUIDANCE = 7.5


class OneClass(Slice):
    """The images of one class of a source, by its label."""

    def __init__(self, source: Source, label: int) -> None:
        super().__init__(source)
        name = source.classes[label]
        self.ids = {name: self.ids[name]}


def back(backbone: Backbone, bank: LatentBank) -> Tensor:
    """Sample every image of a bank back."""
    alone = [
        Plan.equal(label, name, (i,), row)
        for label, (name, ids) in enumerate(bank.members.items())
        for row, i in enumerate(ids)
    ]
    return Synthesizer(backbone, bank, Rule.parse("lin/0")).images(alone)


def sweep(
    backbone: Backbone, bank: LatentBank, counts: tuple[int, ...], draws: int
) -> dict[str, Tensor]:
    """Sample centroids of N images in equal parts by fix/0, for each N."""
    made = {}
    for count in counts:
        planner = Planner(bank.members, Mixing(alpha=math.inf, members=count))
        plans = [planner(0, index) for index in range(draws)]
        made[str(count)] = Synthesizer(backbone, bank, Rule.parse("fix/0")).images(plans)
    return made


def main() -> None:
    """Invert in several ways, sample back, mix, measure, draw, judge."""
    args = options("Inversions: arXiv 2312.04410 and 2505.07481, Fig. 10, 11.", "inversions")
    args = args.parse_args()
    each, null_steps, many, size, draws, counts = sized(
        args, (1, 2, 3, 4, 2, (2, 4)), (2, 10, 200, 16, 12, (2, 4, 8)),
        (32, 50, 500, 100, 50, (2, 4, 8, 16, 32, 64)),
    )  # fmt: skip
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, size)
    judge = open_judge(args, backbone, reference)
    prompts, label = prompts_for(backbone, source), 5 % len(source.classes)
    ways: dict[str, tuple[str, int, float]] = {
        f"published DDIM, guidance {GUIDANCE}": ("published_ddim", null_steps, GUIDANCE),
        f"null-text, guidance {GUIDANCE}": ("null_text", null_steps, GUIDANCE),
        "published DDIM": ("published_ddim", 50, 1.0),
        "DDIM": ("ddim", 50, 1.0),
        "fixed_point": ("fixed_point", 25, 1.0),
        "midpoint": ("midpoint", 25, 1.0),
        "fireflow": ("fireflow", 50, 1.0),
        "forward_start": ("forward_start", 25, 1.0),
    }
    few = Slice(source, last=each)
    real, lpips, tag = load_all(few, backbone), lpips_for(backbone), backbone.fingerprint["weights"]
    images = {"codec alone": backbone.decode(backbone.encode(real)).cpu()}
    rows: list[dict[str, Any]] = []
    quality = {}
    for name in ("codec alone", *tqdm(ways, "inversions")):
        row = {"inversion": name, "steps": "", "evaluations": ""}
        if name in ways:
            method, steps, guidance = ways[name]
            steps = min(steps, 3) if args.toy else steps
            stem = f"{tag[:8]}-{method}-{steps}-{guidance:g}-{each}"
            bank = fill_bank(
                args.out / f"bank-{stem}", backbone, few, prompts, method, steps=steps,
                guidance=guidance, stored=(),
            )  # fmt: skip
            images[name] = once(
                args.out / f"{stem}.safetensors", lambda bank=bank: {"i": back(backbone, bank)}
            )["i"]
            row["steps"], row["evaluations"] = (
                str(steps), str(inverter(method, steps=steps).evaluations)
            )  # fmt: skip
        quality[name] = reconstruction(real, images[name])
        for key, values in quality[name].items():
            row[key] = values.mean().item()
        if lpips:
            row["lpips"] = lpips(real, images[name]).mean().item()
        rows.append(row)
    one, sweeps = OneClass(source, label), {}
    own = {name: prompts[name] for name in one.classes}
    goal = judge.means[label]
    for key, (method, steps, guidance) in {
        "fig10": ("published_ddim", many, 1.0), "fig11": ("null_text", null_steps, GUIDANCE)
    }.items():  # fmt: skip
        stem = f"{tag[:8]}-{key}-{steps}-{size}"
        bank = fill_bank(
            args.out / f"bank-{stem}",
            backbone,
            one,
            own,
            method,
            steps=steps,
            guidance=guidance,
            stored=(),
        )
        sweeps[key] = once(
            args.out / f"{stem}-{draws}.safetensors",
            lambda bank=bank: sweep(backbone, bank, counts, draws),
        )
    far = {
        key: [1 - torch.cosine_similarity(judge.network(found[str(n)]), goal[None]) for n in counts]
        for key, found in sweeps.items()
    }
    figure = Figure(figsize=(1.3 * len(counts) + 1, 3.4), layout="constrained")
    for line, (key, found) in zip(figure.subplots(2, len(counts)), sweeps.items(), strict=True):
        for axes, count in zip(line, counts, strict=True):
            show(axes, found[str(count)][0], f"N = {count}")
        line[0].set_ylabel(f"many steps, {many}" if key == "fig10" else "null-text")
    figure.savefig(args.out / "inversions.png", dpi=120)
    decided = {
        key: {f"N = {counts[-1]}": gain(values[-1], values[0])} for key, values in far.items()
    }
    listed = "; ".join(
        f"{'many steps' if key == 'fig10' else 'null-text'} "
        + ", ".join(f"N = {n}: {mean(v)}" for n, v in zip(counts, values, strict=True))
        for key, values in far.items()
    )
    title = (
        f"reconstruction of {each} images a class. Class distance of FIX centroids of "
        f"{source.classes[label]}, {size} images: {listed}"
    )
    caption = "FIX centroids after many DDIM steps, and of null-text"
    record(args, title, rows, decided, inversions=caption)


if __name__ == "__main__":
    main()
