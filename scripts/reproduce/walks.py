"""Walks between two latents: which keep the images good, and which change them evenly?

    python scripts/reproduce/walks.py --quick
    python scripts/reproduce/walks.py

Ribeiro, *Exploring the latent space of text-to-image diffusion models*, 2023: InterpScore, strips
and GIFs of linear, normalised, spherical, translation walks, and one latent at several standard
deviations. Samuel et al., arXiv 2306.08687: paths of the NAO metric against lerp and slerp. Guo et
al., *Smooth Diffusion*, arXiv 2312.04410: ISTD. Walks go between two images of a class. There is no
text, so InterpScore compares with the mean feature of the class, and an image keeps its class if
that class's mean is the nearest. Intervals are 95 %, over the pairs.
"""

import time
from typing import Any

import torch
from claims import claim, conclude, once, options
from judge import FeatureJudge, better, ci95, open_judge, pictures
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import WALKS, walk
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.solver import sample
from augment.measure.smoothness import STOPS, interp_score, istd
from augment.sources.images import sheet, to_pil
from augment.synthesis.synthesizer import resolve

SCALES = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5)


def frames(backbone: Backbone, bank: LatentBank, name: str, pairs: int) -> dict[str, Tensor]:
    """Sample ``pairs`` walks in each class; return images and the seconds of a walk's latents."""
    begun = time.perf_counter()
    latents = torch.cat([
        walk(bank.latents(kind)[2 * pair], bank.latents(kind)[2 * pair + 1], STOPS, name)
        for kind in bank.classes for pair in range(pairs)
    ])  # fmt: skip
    spent = (time.perf_counter() - begun) / (pairs * len(bank.classes))
    images = sample(backbone, latents, None, **vars(resolve(bank)))
    return {
        "images": images.unflatten(0, (len(bank.classes), pairs, STOPS)),
        "seconds": torch.tensor(spent),
    }


def assessed(images: Tensor, judge: FeatureJudge) -> tuple[Tensor, Tensor, Tensor]:
    """Return InterpScore, share of inner images that keep the class, and ISTD of each walk."""
    labels = torch.arange(len(images)).repeat_interleave(images.shape[1] * images.shape[2])
    found = judge.assess(images.flatten(0, 2), labels)
    features, kept = (found[key].unflatten(0, images.shape[:3]) for key in ("features", "kept"))
    scores = [
        interp_score(features[row, pair], judge.means[row])
        for row in range(len(features))
        for pair in range(features.shape[1])
    ]
    even = [istd(one[None]) for one in images.flatten(0, 1)]
    return torch.tensor(scores), kept[:, :, 1:-1].mean(2).flatten(), torch.tensor(even)


def gif(images: Tensor, path: Any) -> None:
    """Write a walk, there and back, as an animation without end."""
    shots = [to_pil(image).resize((128, 128), Image.Resampling.NEAREST) for image in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    shots[0].save(
        path, save_all=True, append_images=shots[1:] + shots[-2:0:-1], duration=120, loop=0
    )


def scaled(backbone: Backbone, bank: LatentBank, judge: FeatureJudge) -> dict[str, list[float]]:
    """Scale one latent of each class to several deviations; return score and class kept, %."""
    first = torch.stack([bank.latents(name)[0] for name in bank.classes])
    found: dict[str, list[float]] = {"score": [], "kept": []}
    for scale in tqdm(SCALES, "scales"):
        images = sample(backbone, scale * first, None, **vars(resolve(bank)))
        scores, kept, _ = assessed(images[:, None, None].expand(-1, 1, 3, -1, -1, -1), judge)
        found["score"].append(scores.mean().item())
        found["kept"].append(100 * kept.mean().item())
    return found


def main() -> None:
    """Walk, sample, measure, draw, judge."""
    args = options("Walks between two latents.", "walks").parse_args()
    pairs = 2 if args.quick else 8
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, 2 * pairs)
    judge = open_judge(args, backbone, reference)
    bank = fill_bank(args.out / f"bank-{pairs}", backbone, source)
    tag, rows, found = backbone.fingerprint["weights"][:8], [], {}
    for name in tqdm(WALKS, "walks"):
        made = once(
            args.out / f"{tag}-{pairs}-{name}.safetensors",
            lambda name=name: frames(backbone, bank, name, pairs),
        )
        found[name] = assessed(made["images"], judge)
        gif(made["images"][0, 0], args.out / "gifs" / f"{name}.gif")
        scores, kept, even = found[name]
        rows.append({
            "walk": name, "InterpScore": ci95(scores), "class kept, %": ci95(kept, 100),
            "ISTD": ci95(even), "ms a walk": f"{1000 * made['seconds'].item():.1f}",
            "strip": made["images"][-1, 0],
        })  # fmt: skip
    strips = {row["walk"]: list(row.pop("strip")) for row in rows}
    sheet(strips, [f"{k / (STOPS - 1):.1f}" for k in range(STOPS)]).save(args.out / "walks.png")
    scales = scaled(backbone, bank, judge)
    best = SCALES[max(range(len(SCALES)), key=scales["score"].__getitem__)]
    listed = ", ".join(f"{s}: {v:.1f}" for s, v in zip(SCALES, scales["score"], strict=True))
    claims = [
        claim(f"{one} has a better {what} than {other} ({source})",
              f"{ci95(found[one][place])} against {ci95(found[other][place])}",
              better(found[one][place], found[other][place]))
        for one, other, what, place, source in (
            ("normalised", "lerp", "InterpScore", 0, "Ribeiro"),
            ("slerp", "lerp", "InterpScore", 0, "Ribeiro"),
            ("nao", "lerp", "class kept", 1, "Samuel et al."),
            ("nao", "slerp", "class kept", 1, "Samuel et al."),
        )
    ]  # fmt: skip
    claims.append(claim("a latent is best at standard deviation 1 (Ribeiro)", listed, best == 1.0))
    conclude(args, rows, claims)


if __name__ == "__main__":
    main()
