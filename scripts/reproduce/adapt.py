"""Does an adapted backbone make images of the class, and at what price of diversity?

    python scripts/reproduce/adapt.py --quick      # ten minutes on a core
    python scripts/reproduce/adapt.py              # 1500 steps a run, an hour

At 1, 5 and 20 images a class ``latent-augment adapt`` trains a prompt a class, or that and low-rank
weights; then images are made from fresh noise by the prompt of each class, guided. At 5 images also
with a head an image, mixed for each new one by weights uniform on the simplex. The noise has the
channel means of noised training images, without which ``tiny`` makes them too bright. Before
adaptation a class has its coarse word (T-shirt, coat and dress are all *top*). A frozen classifier
judges: is the class kept, how far are the images from real ones (FID), how different are two images
of a class (1 − cosine of features). Interrupt it at any time: the same command resumes.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from claims import claim, conclude, once, options
from judge import FeatureJudge, better, ci95, load_all, open_judge, show
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.conditions import HEADS, Given, Referred
from augment.diffusion.solver import sample
from augment.measure.features import diversity
from augment.sources import Folder, Slice, Source
from augment.sources.fashion import COARSE, write_fashion
from augment.training.adapt.run import adapt_backbone
from augment.training.adapt.settings import AdaptSettings

SHOTS = (1, 5, 20)
KINDS = {
    "prompts": (0, False),
    "prompts and LoRA": (16, False),
    "prompts and image heads": (16, True),
}
"""Rank of the low-rank weights by what is trained, and whether each image has a head."""

HEADS_SHOTS = 5
"""Image heads are trained at this number of images alone."""

GUIDANCE, STEPS = 2.0, 10


def made(backbone: Backbone, prompts: list[str], mean: Tensor, each: int) -> Tensor:
    """Return ``each`` images of every prompt, class by class, by mixtures of its image heads."""
    texts = [prompt for prompt in prompts for _ in range(each)]
    heads = backbone.condition(texts).get(HEADS)
    shape = backbone.latent_shape
    noises = torch.stack([normal(rng(0, "noise", k), *shape) for k in range(len(texts))])

    def words(first: int, last: int) -> Given:
        some = texts[first:last]
        if heads is None:
            return some
        drawn = torch.stack([torch.from_numpy(rng(0, "plan", k).exponential(size=heads.shape[1]))
                             for k in range(first, last)])  # fmt: skip
        drawn = drawn * heads[first:last]
        return Referred(some, (drawn / drawn.sum(1, keepdim=True)).float())

    parts = tqdm([*zip(noises.split(100), range(0, len(texts), 100), strict=True)], "samples")
    return torch.cat(
        [
            sample(backbone, n + mean, words(i, i + len(n)), "fireflow", STEPS, GUIDANCE)
            for n, i in parts
        ]
    )


def mean_of(backbone: Backbone, source: Source) -> Tensor:
    """Return the channel means (C, 1, 1) of noised images at the noisiest level."""
    alpha, _ = backbone.process.alpha_sigma(1.0)
    return alpha * backbone.encode(load_all(source, backbone)).mean((0, 2, 3)).view(-1, 1, 1)


def adapted(
    args: argparse.Namespace, source: Source, name: str, rank: int, heads: bool = False
) -> dict[str, Tensor]:
    """Adapt, or resume; return the seconds that it took, and the last losses."""
    begun = time.perf_counter()
    out = args.out / f"{'quick' if args.quick else 'full'}-{name}"
    settings = AdaptSettings(
        images=source, out=str(out), words=COARSE, rank=rank, steps=300 if args.quick else 1500,
        batch_size=16, lr=1e-3, head_lr=1e-2, token_lr=1e-2, image_heads=heads, device="cpu",
    )  # fmt: skip
    adapt_backbone(settings, load_backbone(args.backbone, "cpu", torch.float32))
    lines = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    column = lines[0].index("loss")
    losses = torch.tensor([float(line[column]) for line in lines[1:] if line[column]])
    return {"seconds": torch.tensor(time.perf_counter() - begun), "losses": losses}


def row(name: str, judge: FeatureJudge, images: Tensor, more: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""
    each = len(images) // len(judge.means)
    labels = torch.arange(len(judge.means)).repeat_interleave(each)
    seen = judge.assess(images, labels)
    spread = [diversity(part) for part in seen["features"].split(each)]
    cells = {"class kept, %": ci95(seen["kept"], 100), "FID": round(judge.fid(seen["features"]), 1)}
    cells["diversity"] = round(sum(spread) / len(spread), 3)
    return {"images": name, **cells, **more}


def main() -> None:
    """Adapt, sample, judge."""
    args = options(__doc__ or "", "adapt").parse_args()
    backbone = load_backbone(args.backbone, "cpu", torch.float32)
    pool = Folder(args.images or write_fashion(args.out / "shots", "shots"))
    real = Folder(write_fashion(args.out / "test", "test"))
    judge, each = open_judge(args, backbone, real), 20 if args.quick else 100
    few = load_all(Slice(real, last=each), backbone)
    rows, sheets = [row("real", judge, few, {"seconds": "", "loss": ""})], {}
    kept: dict[str, Tensor] = {}
    labels = torch.arange(len(pool.classes)).repeat_interleave(each)

    def add(name: str, folder: str, at: Any, prompts: list[str], mean: Tensor, more: Any) -> None:
        path = args.out / f"{'quick' if args.quick else 'full'}-{folder}.safetensors"
        images = once(path, lambda: {"images": made(at, prompts, mean, each)})["images"]
        rows.append(row(name, judge, images, more))
        kept[name], sheets[name] = judge.assess(images, labels)["kept"], images

    words = [COARSE[name] for name in pool.classes]
    mean = mean_of(backbone, Slice(pool, last=20))
    add("coarse words", "before", backbone, words, mean, {"seconds": "", "loss": ""})
    for shots in SHOTS:
        source = Slice(pool, last=shots)
        for kind, (rank, heads) in KINDS.items():
            if heads and shots != HEADS_SHOTS:
                continue
            name = f"{shots}-{'heads' if heads else rank}"
            path = args.out / f"{'quick' if args.quick else 'full'}-{name}-run.safetensors"
            run = once(path, lambda s=source, n=name, r=rank, h=heads: adapted(args, s, n, r, h))
            place = path.with_name(path.name.removesuffix("-run.safetensors"))
            own = load_backbone(args.backbone, "cpu", torch.float32, adapter=place)
            prompts = [f"<{c.lower().replace(' ', '-').replace('/', '-')}>" for c in pool.classes]
            losses = run["losses"]
            facts = {"seconds": round(run["seconds"].item())}
            facts["loss"] = f"{losses[0].item():.3f} → {losses[-1].item():.3f}"
            mean = mean_of(backbone, source)
            add(f"{shots} shots: {kind}", name, own, prompts, mean, facts)
    draw(sheets, each, args.out / "adapt.png")
    alone, both = ([f"{shots} shots: {kind}" for shots in SHOTS] for kind in list(KINDS)[:2])
    before = kept["coarse words"]
    with_lora, without = (torch.stack([kept[name] for name in names]) for names in (both, alone))
    gains = zip(both, with_lora - before, strict=True)
    more = zip(both, with_lora - without, strict=True)
    conclude(args, rows, [
        claim("an adapted generator makes more images of the class (DataDream)",
              "; ".join(f"{name}: {ci95(gain, 100)} points" for name, gain in gains),
              better(with_lora.mean(0), before)),
        claim("LoRA adds to tokens (Diff-Mix)",
              "; ".join(f"{name}: {ci95(gain, 100)} points" for name, gain in more),
              better(with_lora.mean(0), without.mean(0))),
    ])  # fmt: skip


def draw(sheets: dict[str, Tensor], each: int, path: Path) -> None:
    """Draw the first image of every class, a row a cell of the table."""
    figure = Figure((10, 1.1 * len(sheets)), layout="constrained")
    axes = figure.subplots(len(sheets), len(next(iter(sheets.values()))) // each)
    for cells, (name, images) in zip(axes, sheets.items(), strict=True):
        for cell, image in zip(cells, images[::each], strict=True):
            show(cell, image)
        cells[0].set_title(name, fontsize=8, loc="left")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
