"""Walks between two real images: null-text with one series of embeddings, and two baselines.

    python scripts/reproduce/interpolation.py --quick
    python scripts/reproduce/interpolation.py

Fig. 3 of Guo et al., *Smooth Diffusion*, arXiv 2312.04410: two images of a prompt are inverted by
null-text at guidance 7.5 with one series of embeddings for both, nine latents between theirs are
taken by slerp. The baselines: interpolation of clean latents, which resembles that of pixels; and
ANID, which noises both images, interpolates and denoises, with a scheduler of 50 or of 200 steps.
The work does not say up to which level; here it is half of the steps. FireFlow's inversion without
guidance stands beside them. *Detail* is the mean square of an image less its 3 × 3 mean, of the
images between over that of the two given ones. ISTD is of pixels in [0, 1].
"""

import torch
import torch.nn.functional as F
from claims import once, options, record, sized
from judge import ci95, gain, mean, pictures, prompts_for
from torch import Tensor
from tqdm import tqdm

from augment.diffusion import Backbone, load_backbone
from augment.inversion import Inverter, inverter
from augment.measure.reconstruction import reconstruction
from augment.measure.smoothness import STOPS, istd
from augment.sources.images import sheet
from augment.synthesis.between import between

GUIDANCE = 7.5
FEW, MANY = "ANID, 50 steps", "ANID, 200 steps"


def ways(null_steps: int, inner: int) -> dict[str, tuple[Inverter, str, float, float]]:
    """Return by name an inversion, a walk, the level of noise, and the guidance."""
    null = inverter("null_text", steps=null_steps, inner=inner, shared=True)
    return {
        f"null-text {null_steps}, one series": (null, "slerp", 1.0, GUIDANCE),
        "FireFlow 25, no guidance": (inverter("fireflow", steps=25), "slerp", 1.0, 1.0),
        "clean latents (VAE)": (inverter("noise"), "lerp", 0.0, 1.0),
        FEW: (inverter("noise", steps=50), "slerp", 0.5, GUIDANCE),
        MANY: (inverter("noise", steps=200), "slerp", 0.5, GUIDANCE),
    }


def detail(images: Tensor) -> Tensor:
    """Return the mean square of each image (…, C, R, R) less its local mean."""
    flat = images.flatten(0, -4)
    left = flat - F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False)
    return left.square().mean((1, 2, 3)).unflatten(0, images.shape[:-3])


def walks_of(
    backbone: Backbone,
    pairs: Tensor,
    texts: list[str],
    way: tuple[Inverter, str, float, float],
) -> Tensor:
    """Walk between the images of each pair (p, 2, …): (p, STOPS, …)."""
    run, name, level, guidance = way
    made = [
        between(backbone, pair, (text, text), run, name, STOPS, guidance, level)
        for pair, text in zip(pairs, texts, strict=True)
    ]
    return torch.stack(made)


def main() -> None:
    """Walk, measure, draw, judge."""
    args = options("Walks between real images: arXiv 2312.04410, Fig. 3.", "interpolation")
    args = args.parse_args()
    classes, each, null_steps, inner = sized(args, (1, 2, 2, 1), (4, 1, 10, 10), (10, 5, 50, 10))
    backbone = load_backbone(args.backbone)
    source, _ = pictures(args, 2 * each)
    prompts = prompts_for(backbone, source)
    form = backbone.channels, backbone.resolution
    names = source.classes[:classes]
    images = [torch.stack([source.load(i, *form) for i in source.ids[name]]) for name in names]
    pairs = torch.cat([part.unflatten(0, (each, 2)) for part in images])
    texts = [prompts[name] for name in names for _ in range(each)]
    tag = f"{backbone.fingerprint['weights'][:8]}-{len(pairs)}-{null_steps}-{inner}"
    pixels = torch.stack([torch.lerp(*pairs.unbind(1), k / (STOPS - 1)) for k in range(STOPS)], 1)
    rows, strips, details = [], {"pixels": list(pixels[-1])}, {}
    for name, way in tqdm(ways(null_steps, inner).items(), "walks"):
        if args.toy and name in (FEW, MANY):
            way = (inverter("noise", steps=2), *way[1:])
        made = once(
            args.out / f"{tag}-{name.split(',')[0].replace(' ', '-')}-{way[0].steps}.safetensors",
            lambda way=way: {"images": walks_of(backbone, pairs, texts, way)},
        )["images"]
        own = torch.tensor([istd(walk[None]) for walk in made])
        far = (made[:, -1] - made[:, 0]).flatten(1).norm(dim=1)
        psnr = reconstruction(pairs.flatten(0, 1), made[:, [0, -1]].flatten(0, 1))["psnr"]
        off = (made - pixels)[:, 1:-1].square().mean((1, 2, 3, 4)).sqrt()
        details[name] = detail(made[:, 1:-1]).mean(1) / detail(pairs).mean(1)
        rows.append({
            "walk": name, "ISTD": ci95(own), "ISTD / end to end": ci95(own / far),
            "ends, PSNR": ci95(psnr), "detail": ci95(details[name]),
            "RMS from mixed pixels": ci95(off),
        })  # fmt: skip
        label = name.removesuffix(" steps") if name in (FEW, MANY) else name.split(",")[0]
        strips[label.removesuffix(" (VAE)")] = list(made[-1])
    args.out.mkdir(parents=True, exist_ok=True)
    heads = [f"{k / (STOPS - 1):.1f}" for k in range(STOPS)]
    sheet(strips, heads).save(args.out / "interpolation.png")
    found = {
        "sd-fig3-few": {"": mean(details[FEW])},
        "sd-fig3-many": {"": gain(details[MANY], details[FEW])},
    }
    title = f"walks of {STOPS} images between {len(pairs)} pairs of real images of a class"
    caption = "The walk between two real images by each way"
    record(args, title, rows, found, interpolation=caption)


if __name__ == "__main__":
    main()
