"""Walks between two latents: which keep the images good, and which change them evenly?

    python scripts/reproduce/walks.py --quick
    python scripts/reproduce/walks.py

Ribeiro, *Exploring the latent space of text-to-image diffusion models*, 2023: InterpScore, strips
and GIFs of linear, normalised, spherical, translation walks, and one latent at several standard
deviations. Samuel et al., arXiv 2306.08687: paths of the NAO metric against lerp and slerp. Guo et
al., *Smooth Diffusion*, arXiv 2312.04410: ISTD. Walks go between two images of a class; there is no
text here, so InterpScore compares with the mean feature of the class, and quality is whether a
classifier keeps the class. Intervals are 95 %, over the pairs.
"""

import time
from typing import Any

import torch
from claims import claim, conclude, once, options
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from augment.bank import LatentBank
from augment.centroid import WALKS, walk
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.solver import sample
from augment.fill import fill_bank
from augment.images import sheet
from augment.measure.smoothness import STOPS, interp_score, istd
from augment.networks.fashion import fashion_net, load_fashion
from augment.sources import Folder
from augment.sources.fashion import CLASSES, write_fashion
from augment.synthesis import solver_of

SCALES = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5)


def frames(backbone: Backbone, bank: LatentBank, name: str, pairs: int) -> dict[str, Tensor]:
    """Images along ``pairs`` walks in each class, and the seconds that the latents took."""
    begun = time.perf_counter()
    latents = torch.cat([
        walk(bank.latents(kind)[2 * pair], bank.latents(kind)[2 * pair + 1], STOPS, name)
        for kind in bank.classes for pair in range(pairs)
    ])  # fmt: skip
    spent = (time.perf_counter() - begun) / (pairs * len(bank.classes))
    images = sample(backbone, latents, None, *solver_of(bank, "exact", None))
    return {
        "images": images.unflatten(0, (len(bank.classes), pairs, STOPS)),
        "seconds": torch.tensor(spent),
    }


def judged(bank: LatentBank, images: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """InterpScore, share of the inner images that keep the class, and ISTD, of each walk."""
    device = torch.device("cpu")
    eyes, net = load_fashion("", device), fashion_net(device)
    labels = torch.tensor([CLASSES.index(name) for name in bank.classes])
    flat = images.flatten(0, 2)
    features = eyes(flat).unflatten(0, images.shape[:3])
    with torch.no_grad():
        right = net(flat).argmax(1).unflatten(0, images.shape[:3]) == labels[:, None, None]
    scores = [
        interp_score(features[row, pair], means[row])
        for row in range(len(features))
        for pair in range(features.shape[1])
    ]
    even = [istd(one[None]) for one in images.flatten(0, 1)]
    kept = right[:, :, 1:-1].double().mean(2).flatten()
    return torch.tensor(scores), kept, torch.tensor(even)


def told(values: Tensor, scale: float = 1.0) -> str:
    """Mean ± 95 %."""
    return f"{scale * values.mean():.2f} ± {1.96 * scale * values.std() / len(values) ** 0.5:.2f}"


def gif(images: Tensor, path: Any) -> None:
    """There and back, for ever."""
    pixels = (images[:, 0] * 255).round().byte().numpy()
    shots = [Image.fromarray(p).resize((128, 128), Image.Resampling.NEAREST) for p in pixels]
    path.parent.mkdir(parents=True, exist_ok=True)
    shots[0].save(
        path, save_all=True, append_images=shots[1:] + shots[-2:0:-1], duration=120, loop=0
    )


def better(one: Tensor, other: Tensor) -> bool | None:
    """Whether one is larger, pair by pair; None within the interval."""
    gains = one - other
    error = 1.96 * gains.std().item() / len(gains) ** 0.5
    return None if abs(gains.mean()) <= error else bool(gains.mean() > 0)


def scaled(backbone: Backbone, bank: LatentBank, means: Tensor) -> dict[str, list[float]]:
    """One latent of each class at several standard deviations: score and class kept, %."""
    first = torch.stack([bank.latents(name)[0] for name in bank.classes])
    found: dict[str, list[float]] = {"score": [], "kept": []}
    for scale in tqdm(SCALES, "scales"):
        images = sample(backbone, scale * first, None, *solver_of(bank, "exact", None))
        scores, kept, _ = judged(bank, images[:, None, None].expand(-1, 1, 3, -1, -1, -1), means)
        found["score"].append(scores.mean().item())
        found["kept"].append(100 * kept.mean().item())
    return found


def main() -> None:
    """Walk, sample, measure, draw, judge."""
    args = options("Walks between two latents.", "walks").parse_args()
    pairs = 2 if args.quick else 8
    backbone = load_backbone(args.backbone)
    source = Folder(write_fashion(args.out / "images", "shots", list(range(2 * pairs))))
    bank = fill_bank(args.out / f"bank-{pairs}", backbone, source)
    eyes = load_fashion("", torch.device("cpu"))
    means = torch.stack([
        torch.nn.functional.normalize(
            eyes(torch.stack([source.load(i, 1, 32) for i in source.ids[name]])), dim=1
        ).mean(0)
        for name in bank.classes
    ])  # fmt: skip
    tag, rows, found = backbone.fingerprint["weights"][:8], [], {}
    for name in tqdm(WALKS, "walks"):
        made = once(
            args.out / f"{tag}-{pairs}-{name}.safetensors",
            lambda name=name: frames(backbone, bank, name, pairs),
        )
        found[name] = judged(bank, made["images"], means)
        gif(made["images"][0, 0], args.out / "gifs" / f"{name}.gif")
        scores, kept, even = found[name]
        rows.append({
            "walk": name, "InterpScore": told(scores), "class kept, %": told(kept, 100),
            "ISTD": told(even), "ms a walk": f"{1000 * made['seconds'].item():.1f}",
            "strip": made["images"][-1, 0],
        })  # fmt: skip
    strips = {row["walk"]: list(row.pop("strip")) for row in rows}
    sheet(strips, [f"{k / (STOPS - 1):.1f}" for k in range(STOPS)]).save(args.out / "walks.png")
    scales = scaled(backbone, bank, means)
    best = SCALES[max(range(len(SCALES)), key=scales["score"].__getitem__)]
    told_scales = ", ".join(f"{s}: {v:.1f}" for s, v in zip(SCALES, scales["score"], strict=True))
    claims = [
        claim(f"{one} has a better {what} than {other} ({source})",
              f"{told(found[one][place])} against {told(found[other][place])}",
              better(found[one][place], found[other][place]))
        for one, other, what, place, source in (
            ("normalised", "lerp", "InterpScore", 0, "Ribeiro"),
            ("slerp", "lerp", "InterpScore", 0, "Ribeiro"),
            ("nao", "lerp", "class kept", 1, "Samuel et al."),
            ("nao", "slerp", "class kept", 1, "Samuel et al."),
        )
    ]  # fmt: skip
    claims.append(
        claim("a latent is best at standard deviation 1 (Ribeiro)", told_scales, best == 1.0)
    )
    conclude(args, rows, claims)


if __name__ == "__main__":
    main()
