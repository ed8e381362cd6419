"""Reconstruction under guidance behind a lossy codec: DDIM and null-text.

    python scripts/reproduce/reconstruction.py --quick
    python scripts/reproduce/reconstruction.py

Table 2 of Guo et al., *Smooth Diffusion*, arXiv 2312.04410: MSE, LPIPS, SSIM and PSNR of DDIM and
of null-text inversion at guidance 7.5, with the error of the autoencoder alone for bound. The codec
of ``tiny`` has no error, so JPEG stands for it, at the quality that comes nearest to the published
25.98 dB: images are compressed, inverted, sampled back, and compared with what they were before.
The smoothed backbone is in ``smooth_diffusion.py``, other inversions in ``inversions.py``. LPIPS
takes weights that torchvision downloads; it is left out where it cannot be had.
"""

import io
from typing import Any

import torch
from claims import once, options, record, sized
from judge import ci95, gain, load_all, pictures, prompts_for
from torch import Tensor

from augment.diffusion import Backbone, load_backbone
from augment.diffusion.conditions import Schedule
from augment.diffusion.solver import sample
from augment.inversion import inverted, inverter
from augment.measure.reconstruction import reconstruction
from augment.report.evaluate import lpips_for
from augment.sources.images import decode_image, sheet, to_pil

GUIDANCE = 7.5
BOUND = 25.98  # dB, of the autoencoder of Stable Diffusion on COCO
WAYS = {"guided DDIM": "published_ddim", "guided null-text": "null_text"}


def after_jpeg(images: Tensor, decibels: float = BOUND) -> tuple[Tensor, int]:
    """Compress images (n, C, R, R) by JPEG at the quality that comes nearest to a mean PSNR.

    Returns:
        The images that are left, and the quality.
    """

    def compress(quality: int) -> Tensor:
        left = []
        for image in images:
            file = io.BytesIO()
            to_pil(image).save(file, "JPEG", quality=quality)
            left.append(decode_image(file.getvalue(), *image.shape[:2]))
        return torch.stack(left)

    def off(quality: int) -> float:
        found = reconstruction(images, compress(quality))["psnr"].mean().item()
        return abs(found - decibels)

    best = min(range(1, 96), key=off)
    return compress(best), best


def back(
    backbone: Backbone, images: Tensor, texts: list[str], method: str, steps: int
) -> dict[str, Tensor]:
    """Invert images and sample their latents back, both under guidance."""
    run, negative = inverter(method, steps=steps), None
    found = inverted(run, backbone, images, texts, GUIDANCE)
    if "nulls" in found:
        nulls = found["nulls"][found["null_rows"]]
        negative = Schedule.by_step(backbone.process.levels(steps), nulls)
    latents = found["latents"]
    how = (run.solver, steps, GUIDANCE)
    return {"images": sample(backbone, latents, texts, *how, negative=negative)}


def main() -> None:
    """Compress, invert, sample back, measure, judge."""
    args = options("Reconstruction: arXiv 2312.04410, Table 2.", "reconstruction").parse_args()
    each, steps = sized(args, (1, 2), (2, 50), (50, 50))
    backbone = load_backbone(args.backbone)
    source, _ = pictures(args, each)
    prompts = prompts_for(backbone, source)
    texts = [prompts[source.classes[label]] for _, label in source.samples]
    real, lpips = load_all(source, backbone), lpips_for(backbone)
    compressed, jpeg = after_jpeg(real)
    stem = f"{backbone.fingerprint['weights'][:8]}-{each}-{steps}-{jpeg}"
    images = {f"JPEG {jpeg} alone": compressed}
    for name, method in WAYS.items():
        images[name] = once(
            args.out / f"{stem}-{method}.safetensors",
            lambda method=method: back(backbone, compressed, texts, method, steps),
        )["images"]
    quality = {name: reconstruction(real, made) for name, made in images.items()}
    rows: list[dict[str, Any]] = []
    for name, made in images.items():
        row: dict[str, Any] = {"reconstruction": name}
        row |= {key: ci95(values) for key, values in quality[name].items()}
        rows.append(row | ({"lpips": ci95(lpips(real, made))} if lpips else {}))
    args.out.mkdir(parents=True, exist_ok=True)
    strips = {"real": real, **images}
    number = min(len(real), 10)
    lines = {name.removeprefix("guided "): list(part[:number]) for name, part in strips.items()}
    sheet(lines, [""] * number).save(args.out / "reconstruction.png")
    bound, plain, null = (found["psnr"] for found in quality.values())
    found = {"sd-table2-null": {"": gain(null, plain)}, "sd-table2-plain": {"": gain(bound, null)}}
    title = (
        f"{len(real)} images after JPEG {jpeg}, inverted and sampled back in {steps} steps at "
        f"guidance {GUIDANCE}"
    )
    record(args, title, rows, found, reconstruction="Images, JPEG, guided DDIM, null-text")


if __name__ == "__main__":
    main()
