r"""What is judged of a model: its codec, its network, each inversion, centroids by rule.

The network's mean squared error of the clean estimate is put over that of the best estimate that
knows nothing of images, :math:`s^2\sigma^2/(\alpha^2 s^2 + \sigma^2)`, s the deviation of clean
latents. From 1 on it does not denoise. Reading the same output as another prediction shows whether
the scheduler file names a wrong one. `LIMITS` are wide: a model that is merely unusual passes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.core.errors import UserError
from augment.core.rng import normal, rng
from augment.diffusion.process import PREDICTIONS
from augment.diffusion.sampling import Sampling
from augment.inversion import INVERTERS, inverter
from augment.measure.health import MIN_PSNR
from augment.plan.plan import Plan
from augment.report import RULES
from augment.report.check.subject import Line, Subject, short
from augment.sources.images import reduce, sheet
from augment.sources.subsets import Selection
from augment.synthesis.synthesizer import Synthesizer

THUMBNAIL = 128  # pixels of the sheet's smallest images
LEVELS = (0.25, 0.5, 0.75)
"""Noise levels that the network is asked at."""


@dataclass(frozen=True)
class Limits:
    """What is expected of an inversion.

    Args:
        back: lowest PSNR of images sampled back, in dB; the codec's own less 3 dB if that is less.
        norm: lowest and highest mean of ‖z‖/√D; 1 of white noise.
        correlation: highest |correlation| of neighbouring pixels; 0 of white noise.
        bias: highest |channel mean|; 0 of white noise.
    """

    back: float = 17.0
    norm: tuple[float, float] = (0.6, 1.1)
    correlation: float = 0.5
    bias: float = 0.5


LIMITS = dict.fromkeys(INVERTERS, Limits()) | {
    "forward_start": Limits(back=MIN_PSNR, norm=(0.95, 1.05), correlation=0.1, bias=0.3),
    "fireflow": Limits(back=MIN_PSNR),
    "published_ddim": Limits(back=15.0),
    "negative_prompt": Limits(back=15.0),
    "null_text": Limits(back=15.0),
}
"""Expectations by inversion. `forward_start` leaves noise of the law; the others leave something of
the image in smooth regions (arXiv 2410.23530), which changes their length; published DDIM errs
most. What guidance must repair is held to less."""


def codec(subject: Subject) -> Iterator[Line]:
    """Judge what the codec loses, and the scale of its latents."""
    db, spread = subject.codec_psnr, subject.clean.std().item()
    reason = f"expected at least {MIN_PSNR:g} dB; the autoencoder's weights are not whole"
    good = db >= MIN_PSNR
    text = f"images back at {db:.1f} dB (PSNR)"
    yield Line("codec", text, good, "" if good else reason, {"psnr": db})
    good = 0.5 <= spread <= 2
    reason = (
        "expected 0.5 to 2, so that noise levels mean what they say; look at scaling_factor "
        "and shift_factor in the config.json of the autoencoder (vae)"
    )
    text = f"clean latents have a deviation of {spread:.2f}"
    yield Line("scale", text, good, "" if good else reason, {"deviation": spread})


def errors_by_prediction(subject: Subject) -> dict[str, list[float]]:
    """Return the network's error over that of the ignorant estimate, by `LEVELS`.

    Its output is read as each of `PREDICTIONS`.
    """
    process, clean = subject.backbone.process, subject.clean
    condition = subject.backbone.condition([subject.prompt] * len(clean))
    noise, variance = normal(rng(0, "noise"), *clean.shape).to(clean), clean.var().item()
    errors: dict[str, list[float]] = {name: [] for name in PREDICTIONS}
    for level in LEVELS:
        alpha, sigma = process.alpha_sigma(level)
        noisy = alpha * clean + sigma * noise
        with torch.no_grad():
            output = subject.backbone.network(noisy, process.timestep(level), condition)
        ignorant = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        for name, read in PREDICTIONS.items():
            wrong = (read(noisy, output, alpha, sigma)[0] - clean).square().mean().item()
            errors[name].append(wrong / ignorant)
    return errors


def network(subject: Subject) -> Iterator[Line]:
    """Judge how well the network denoises, with its prediction and with others."""
    own, errors = subject.backbone.process.prediction, errors_by_prediction(subject)
    whole = all(isfinite(error) for error in errors[own])
    ratios = {name: max(values) for name, values in errors.items()}
    best = min(ratios, key=lambda name: ratios[name])
    pairs = zip(LEVELS, errors[own], strict=True)
    text = "error of the clean estimate over that of one that knows nothing of images: "
    text += ", ".join(f"{error:.2f} at noise level {level:g}" for level, error in pairs)
    good, reason = whole and ratios[own] < 1, ""
    if not whole:
        reason = (
            f"expected finite numbers; the network overflows in {short(subject.dtype)}, so take "
            "dtype bfloat16 or float32"
        )
    elif not good and ratios[best] < 1:
        reason = (
            f"its output fits the prediction {best} ({ratios[best]:.2f}) and not {own}, which "
            "its scheduler file says; correct prediction_type in scheduler_config.json"
        )
    elif not good:
        reason = (
            "expected below 1; the network does not denoise: its weights are untrained or "
            "damaged, or prediction, noise levels or scale of latents are not its own"
        )
    yield Line("network", text, good, reason, {"levels": LEVELS, "errors": errors[own]})


def bank_of(subject: Subject, name: str, place: Path) -> LatentBank:
    """Invert the images; the inversion that optimises does less, and the first alone."""
    source, fewer = Selection(subject.source), dict[str, Any]()
    if inverter(name).guidance != 1:
        source.ids, fewer["inner"] = {subject.name: subject.ids[:1]}, 3
    return fill_bank(
        place, subject.backbone, source, subject.prompts, name,
        batch_size=subject.batch, max_rejects=0.0, steps=subject.steps, **fewer,
    )  # fmt: skip


def inversion(subject: Subject, name: str, place: Path, banks: list[LatentBank]) -> Iterator[Line]:
    """Judge the latents of an inversion, and how well images come back; append its bank."""
    banks.append(bank_of(subject, name, place))
    health, limits = banks[-1].health(subject.name), LIMITS[name]
    s, back = health.statistics, health.psnr or 0.0
    least = min(limits.back, subject.codec_psnr - 3)
    across = max(s.horizontal, s.vertical, key=abs)
    text = (
        f"images back at {back:.1f} dB, norm/√D {s.norm:.3f}, largest channel mean "
        f"{s.largest[0]:.2f}, neighbours' correlation {across:+z.2f}"
    )
    faults = []
    if not back >= least:
        faults.append(f"at least {least:.1f} dB")
    if not limits.norm[0] <= s.norm <= limits.norm[1]:
        faults.append(f"a norm of {limits.norm[0]:g} to {limits.norm[1]:g}")
    if not s.largest[0] <= limits.bias:
        faults.append(f"a channel mean of at most {limits.bias:g}")
    if not abs(across) <= limits.correlation:
        faults.append(f"a correlation of at most {limits.correlation:g}")
    values = {"psnr": back, "norm": s.norm, "channel_means": s.channel_means}
    values |= {"horizontal": s.horizontal, "vertical": s.vertical}
    reason = f"expected {' and '.join(faults)}" if faults else ""
    yield Line(name, text, not faults, reason, values)


def centroids(subject: Subject, bank: LatentBank, out: str | None) -> Iterator[Line]:
    """Make the centroid of all images by each rule; write the sheet."""
    sampling = Sampling(batch_size=subject.batch)
    plan = Plan.equal(0, subject.name, subject.ids)
    singles = [Plan.equal(0, subject.name, [i], k) for k, i in enumerate(subject.ids)]
    rows = {"real": subject.pixels}
    rows["back"] = Synthesizer(subject.backbone, bank, Rule(), sampling).images(singles).cpu()
    made = {}
    for rule in RULES:
        synthesizer = Synthesizer(subject.backbone, bank, Rule.parse(rule), sampling)
        made[rule] = synthesizer.images([plan]).cpu()
    contrasts = {rule: image.std().item() for rule, image in made.items()}
    real = subject.pixels.std().item()
    good = contrasts["fade/chm"] > real / 4
    text = f"contrast of the centroid of {len(subject.ids)} images: "
    text += ", ".join(f"{rule} {value:.2f}" for rule, value in contrasts.items())
    text += f"; of the images {real:.2f}"
    reason = "" if good else "expected at least a quarter of the images' by fade/chm"
    if out:
        shown = {name: list(reduce(images, 256)) for name, images in (rows | made).items()}
        count = max(map(len, shown.values()))
        zoom = max(THUMBNAIL // subject.backbone.resolution, 1)
        page = sheet(shown, [str(k + 1) for k in range(count)], zoom=zoom)
        try:
            page.save(out, "PNG")
        except OSError as error:
            raise UserError(
                f"expected to write {out}, got {error.strerror or error}; name another file"
            ) from None
        text += f"; {out}"
    yield Line("centroids", text, good, reason, {"contrasts": contrasts, "real": real})
