"""Walks between two latents: which keep the images good, and which change them evenly?

    python scripts/reproduce/walks.py --quick
    python scripts/reproduce/walks.py

Ribeiro, *Exploring the latent space of text-to-image diffusion models*, 2023: walks between two
noises of one prompt, with the InterpScore against it; a window that slides over several noises set
side by side, with the shift by which each image fits its neighbour best; and noises of several
standard deviations, as pictures. There is no text tower, so InterpScore compares with the mean
feature of the prompt's classes. Samuel et al., arXiv 2306.08687: paths of the NAO metric between
two images of a class against lerp and slerp. Guo et al., arXiv 2312.04410: ISTD.
Intervals are 95 %, over the pairs.
"""

from itertools import pairwise
from typing import Any

import torch
from claims import once, options, record, sized
from judge import ci95, gain, mean, open_judge, pictures, prompts_for
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from works import Interval

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import WALKS, slide, walk
from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.solver import sample
from augment.measure.smoothness import STOPS, interp_score, istd
from augment.sources.images import sheet, to_pil

SCALES = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
BY_TEXT = ("lerp", "normalised", "slerp")
HOW: dict[str, Any] = {"solver": "fireflow", "steps": 10}
JOINED = 4  # noises side by side


def between(ends: Tensor, name: str, backbone: Backbone, texts: list[str] | None) -> Tensor:
    """Sample walks between pairs of latents (p, 2, C, H, W): images (p, STOPS, …)."""
    latents = torch.cat([walk(*pair, STOPS, name) for pair in ends])
    words = None if texts is None else [text for text in texts for _ in range(STOPS)]
    return sample(backbone, latents, words, **HOW).unflatten(0, (len(ends), STOPS))


def shift(image: Tensor, other: Tensor, most: int) -> int:
    """Return by how many columns to the left an image fits another one best, by correlation."""

    def fit(columns: int) -> float:
        width = image.shape[-1]
        a = image[..., max(columns, 0) : width + min(columns, 0)].flatten()
        b = other[..., max(-columns, 0) : width + min(-columns, 0)].flatten()
        return torch.cosine_similarity(a - a.mean(), b - b.mean(), dim=0).item()

    return max(range(-most, most + 1), key=fit)


def gif(images: Tensor, path: Any) -> None:
    """Write a walk, there and back, as an animation without end."""
    shots = [to_pil(image).resize((128, 128), Image.Resampling.NEAREST) for image in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    shots[0].save(
        path, save_all=True, append_images=shots[1:] + shots[-2:0:-1], duration=120, loop=0
    )


def kept_of(images: Tensor, labels: Tensor, judge: Any) -> Tensor:
    """Return the share of a walk's inner images that keep its class."""
    rows = labels.repeat_interleave(images.shape[1])
    kept = judge.assess(images.flatten(0, 1), rows)["kept"].unflatten(0, images.shape[:2])
    return kept[:, 1:-1].mean(1)


def between_images(bank: LatentBank, pairs: int) -> tuple[Tensor, Tensor]:
    """Return pairs of latents of a class (p, 2, …), and the classes (p,)."""
    ends = [bank.latents(name)[: 2 * pairs].unflatten(0, (pairs, 2)) for name in bank.classes]
    return torch.cat(ends), torch.arange(len(ends)).repeat_interleave(pairs)


def main() -> None:
    """Walk, sample, measure, draw, judge."""
    args = options("Walks between two latents.", "walks").parse_args()
    pairs, each = sized(args, (1, 2), (2, 4), (8, 40))
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, 2 * pairs)
    judge = open_judge(args, backbone, reference)
    bank = fill_bank(args.out / f"bank-{pairs}", backbone, source)
    tag, rows, strips = backbone.fingerprint["weights"][:8], [], {}
    prompts = prompts_for(backbone, source)
    words = list(dict.fromkeys(prompts.values()))
    homes = torch.tensor([words.index(prompts[name]) for name in source.classes])
    goals = {text: judge.means[homes == k].mean(0) for k, text in enumerate(words)}
    texts = [text for text in words for _ in range(each)]
    noises = normal(rng(0, "noise"), 2 * len(texts), *backbone.latent_shape)
    ends = noises.unflatten(0, (len(texts), 2))
    real_ends, labels = between_images(bank, pairs)
    scores, kept = {}, {}
    for name in tqdm(WALKS, "walks"):
        row: dict[str, Any] = {"walk": name}
        made = once(
            args.out / f"{tag}-{pairs}-{name}.safetensors",
            lambda name=name: {"images": between(real_ends, name, backbone, None)},
        )["images"]
        kept[name] = kept_of(made, labels, judge)
        even = torch.tensor([istd(one[None]) for one in made])
        row |= {"images: class kept, %": ci95(kept[name], 100), "images: ISTD": ci95(even)}
        strips[name] = list(made[-1])
        gif(made[0], args.out / "gifs" / f"{name}.gif")
        row["noises: InterpScore"] = ""
        if name in BY_TEXT:
            made = once(
                args.out / f"{tag}-noise-{each}-{name}.safetensors",
                lambda name=name: {"images": between(ends, name, backbone, texts)},
            )["images"]
            features = judge.network(made.flatten(0, 1)).unflatten(0, made.shape[:2])
            scores[name] = torch.tensor(
                [interp_score(x, goals[text]) for x, text in zip(features, texts, strict=True)]
            )
            row["noises: InterpScore"] = ci95(scores[name])
        rows.append(row)
    sheet(strips, [f"{k / (STOPS - 1):.1f}" for k in range(STOPS)]).save(args.out / "walks.png")
    moved, pan = pans(noises, words, backbone, 6 if args.toy else 24, args.out / "pan.safetensors")
    scaled = {
        f"{scale:g}": list(sample(backbone, scale * noises[: len(words)], words, **HOW))
        for scale in SCALES
    }
    sheet({text[:12]: list(line) for text, line in zip(words, pan, strict=True)},
          [str(k) for k in range(pan.shape[1])]).save(args.out / "pan.png")  # fmt: skip
    sheet(scaled, [text[:12] for text in words]).save(args.out / "scales.png")
    found = {
        "ri-linear": {name: gain(scores["lerp"], scores[name]) for name in ("normalised", "slerp")},
        "ri-pan": {"": moved},
        "na-walks": {name: gain(kept["nao"], kept[name]) for name in ("lerp", "slerp")},
    }
    title = (
        f"walks of {STOPS} images, FireFlow 10: {len(labels)} between two images of a class, "
        f"{len(texts)} between two noises of a prompt"
    )
    captions = {
        "walks": "A walk of each kind", "pan": f"A window that slides over {JOINED} noises",
        "scales": "Noises of several standard deviations",
    }  # fmt: skip
    record(args, title, rows, found, **captions)


def pans(
    noises: Tensor, words: list[str], backbone: Backbone, count: int, path: Any
) -> tuple[Interval, Tensor]:
    """Slide over several noises of each prompt: how far images move against the window, images."""
    sets = noises[: JOINED * len(words)].unflatten(0, (len(words), JOINED))
    windows = [slide(latents, count) for latents in sets]
    columns = torch.arange(JOINED * noises.shape[-1]).to(noises).view(JOINED, 1, 1, -1)
    places = slide(columns, count)[:, 0, 0, 0].long().tolist()
    texts = [text for text in words for _ in range(count)]
    made = once(path, lambda: {"images": sample(backbone, torch.cat(windows), texts, **HOW)})
    images = made["images"].unflatten(0, (len(words), count))
    size = backbone.resolution // noises.shape[-1]  # pixels a column
    ratios = [
        shift(one, other, images.shape[-1] // 4) / (size * (places[k + 1] - places[k]))
        for line in images
        for k, (one, other) in enumerate(pairwise(line))
    ]
    return mean(torch.tensor(ratios)), images


if __name__ == "__main__":
    main()
