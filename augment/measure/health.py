"""The health of a bank's latents: the same numbers and sentences wherever a bank is shown.

`augment.bank.bank.LatentBank.health` measures a class. ``evaluate`` and the report show a row of
each class and the findings on all of them, ``invert`` those on its most biased class, and
``inspect`` those that follow from the commit records, without reading a latent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from augment.centroid.prior import nominal_norm
from augment.diffusion.usage import KNOWN
from augment.measure.bias import BIAS_THRESHOLD, predicted_bias
from augment.measure.latents import LatentStatistics, latent_statistics, norm_law
from augment.measure.reconstruction import psnr

NORM_TOLERANCE = 0.02  # of a mean norm over √D
CORRELATION_THRESHOLD = 0.05  # of neighbouring pixels; latents of DDIM have 0.1 and more
MIN_PSNR = 20.0  # dB of images sampled back; every inversion here is well above
MAX_LOSS = 3.5  # dB below images that the model was trained on; photographs lose 6 to 9 by tiny
MAX_LONGER = 0.05  # in ‖z‖/√D, likewise; photographs 0.09 to 0.18
COARSE = 1.05  # factor of the size from which on an image is reduced or enlarged
VERDICT = ("Model", "Images")
"""Topics of the findings that come first: does the model know these images, and what do they lose?
"""


@dataclass(frozen=True)
class ClassHealth:
    """Measurements of a class.

    Args:
        name: name of the class.
        statistics: statistics of its latents.
        norms: ‖z‖/√D of each latent.
        errors: mean squared error of each image sampled back, in the order of the bank's members;
            None if the bank does not keep them.
    """

    name: str
    statistics: LatentStatistics
    norms: tuple[float, ...]
    errors: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        latents: Float[Tensor, "n c h w"],
        errors: Float[Tensor, " n"] | None = None,
    ) -> "ClassHealth":
        """Measure the latents of a class.

        Raises:
            UserError: see `latent_statistics`.
        """
        statistics = latent_statistics(latents)
        norms = (latents.flatten(1).norm(dim=1) / nominal_norm(statistics.dim)).tolist()
        kept = None if errors is None else tuple(errors.tolist())
        return cls(name, statistics, tuple(norms), kept)

    @property
    def fixed_bias(self) -> float:
        """Largest absolute channel mean that ``fix/0`` makes of all latents in equal parts."""
        return predicted_bias(self.statistics, self.statistics.count, math.inf)

    @property
    def psnr(self) -> float | None:
        """PSNR of its images sampled back, in dB, by their mean squared error."""
        return None if self.errors is None else psnr(fmean(self.errors))

    def row(self) -> dict[str, str | float]:
        """Return the class's row of a table, by the titles of the columns."""
        s = self.statistics
        numbers = {"norm": s.norm, "norm sigmas": s.norm_sigmas, "correlation": s.horizontal}
        numbers |= {} if self.psnr is None else {"PSNR": self.psnr}
        return {
            "class": self.name,
            "latents": s.count,
            "bias": round(s.largest[0], 4),
            "biased": s.biased,
            "fix/0 bias": round(self.fixed_bias, 4),
            **{title: round(value, 4) for title, value in numbers.items()},
        }


def from_most_biased(classes: Sequence[ClassHealth], count: int) -> list[ClassHealth]:
    """Choose classes evenly from the largest to the smallest `ClassHealth.fixed_bias`.

    Args:
        classes: all classes.
        count: maximum number of classes; both ends are among them if it is at least 2.
    """
    order = sorted(classes, key=lambda c: -c.fixed_bias)
    if count >= len(order):
        return order
    step = (len(order) - 1) / max(count - 1, 1)
    return [order[round(place * step)] for place in range(count)]


class Fitting(NamedTuple):
    """How images were brought to the format of a model.

    Args:
        total: number of images.
        side: median of their shorter sides, in pixels.
        resolution: side that the model takes, in pixels.
        blurred: number of images that were enlarged so much that their latents are of blurs.
        coloured: number of images whose colour a model of grey images lost.
    """

    total: int
    side: float
    resolution: int
    blurred: int
    coloured: int


class Finding(NamedTuple):
    """A sentence on the health of a bank.

    Args:
        level: ``good``, or ``warning`` if there is something to do.
        topic: what it is about, in a word.
        text: what was found, and which rule or setting cures it.
    """

    level: str
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.topic}. {self.text}"


def findings(
    classes: Sequence[ClassHealth],
    inversion: str,
    of_noise: bool = True,
    backbone: str = "",
    images: Fitting | None = None,
) -> list[Finding]:
    """Return all findings on classes: those of `VERDICT`, then warnings, then the rest.

    Args:
        classes: at least one class.
        inversion: how they were inverted, such as ``ddim in 50 steps``.
        of_noise: whether latents are at the noisiest level, where they should be white noise.
        backbone: name of the model.
        images: how its images were brought to the model's format, if known.
    """
    norms = [norm for c in classes for norm in c.norms]
    found = verdict(classes, inversion, backbone, images)
    if of_noise:
        found.append(_bias_finding(classes))
        dim = classes[0].statistics.dim
        found.append(norm_finding(fmean(norms), len(norms), dim, inversion))
        found += _correlation_finding(classes, inversion)
    known = {c.name: c.psnr for c in classes if c.psnr is not None}
    if known:
        worst = min(known, key=lambda name: known[name])
        of_worst = f", {known[worst]:.1f} dB in class {worst}" if len(classes) > 1 else ""
        found.append(reconstruction_finding(fmean(known.values()), inversion, of_worst))
    single = [c.name for c in classes if c.statistics.count == 1]
    if single:
        text = (
            f"{_share(len(single), len(classes))} one image, such as {single[0]}: there is nothing "
            "to mix, and every centroid is that image again."
        )
        found.append(Finding("warning", "Single images", text))
    order = {topic: place for place, topic in enumerate(VERDICT)}
    return sorted(found, key=lambda f: (order.get(f.topic, len(order)), f.level == "good"))


def verdict(
    classes: Sequence[ClassHealth], inversion: str, backbone: str, images: Fitting | None
) -> list[Finding]:
    """Return the findings of `VERDICT`; arguments as for `findings`."""
    return _model_findings(classes, inversion, backbone) + (
        [_images_finding(images)] if images else []
    )


def _model_findings(classes: Sequence[ClassHealth], inversion: str, backbone: str) -> list[Finding]:
    """Say whether an embedded model knows the images, by how well they come back.

    Without that, by the length of their latents. Of models other than `KNOWN`, and of inversions
    whose figures are not known, nothing is said.
    """
    known = KNOWN.get(backbone)
    usual = known and known.at(inversion)
    if known is None or usual is None:
        return []
    found = [c.psnr for c in classes if c.psnr is not None]
    mean = fmean(found) if found else None
    norm = fmean(norm for c in classes for norm in c.norms)
    near = fmean(c.statistics.horizontal for c in classes)
    numbers = f"norm over √D of their latents {norm:.2f}, correlation of neighbours {near:+z.2f}"
    theirs = f"norm {usual.norm:.2f}, correlation {usual.correlation:+z.2f}"
    if mean is not None:
        numbers = f"they come back at {mean:.1f} dB (PSNR), {numbers}"
        theirs = f"{usual.psnr:.1f} dB, {theirs}"
    numbers += f" (of {known.images} {theirs})"
    bad = norm > usual.norm + MAX_LONGER if mean is None else mean < usual.psnr - MAX_LOSS
    if not bad:
        return [Finding("good", "Model", f"{backbone} knows images like these: {numbers}.")]
    text = (
        f"{backbone} DOES NOT KNOW THESE IMAGES: {numbers}. It draws {known.images} and nothing "
        "else, so synthetic images will be black or grey blobs. Use it to try the commands; for "
        "photographs invert with --backbone sd15, or with tiny-cifar, which needs no download but "
        "takes 32×32 pixels; see docs/backbones.md."
    )
    return [Finding("warning", "Model", text)]


def _images_finding(images: Fitting) -> Finding:
    """Say what images lost on the way to the model: their colour, and how much of their size."""
    factor, lost = images.side / images.resolution, []
    sides = (
        f"median of the shorter sides {images.side:.0f} pixels, of the model {images.resolution}"
    )
    if factor > COARSE:
        text = f"Images are reduced {factor:.1f}-fold ({sides})."
    elif factor < 1 / COARSE:
        text = f"Images are enlarged {1 / factor:.1f}-fold ({sides})."
    else:
        text = f"Images are as large as the model's ({sides})."
    if images.coloured:
        lost.append(
            f"The model is grey: {images.coloured} of {images.total} images lost their colour."
        )
    if images.blurred:
        lost.append(
            f"{images.blurred} of {images.total} are enlarged so much that their latents are of "
            "blurred images."
        )
    return Finding("warning" if lost else "good", "Images", " ".join([text, *lost]))


def _bias_finding(classes: Sequence[ClassHealth]) -> Finding:
    """Say whether rules without a mean split are safe."""
    biased = [c for c in classes if c.statistics.biased]
    if not biased:
        some = "No class has a" if len(classes) > 1 else "The class has no"
        return Finding("good", "Bias", f"{some} significant channel bias: any rule will do.")
    bad = [c for c in biased if c.fixed_bias >= BIAS_THRESHOLD]
    worst = max(biased, key=lambda c: c.fixed_bias)
    mean, error = worst.statistics.largest
    enlarged = (
        f"fix/0 would enlarge the {mean:.2f} ± {error:.2f} of {worst.name} to "
        f"{worst.fixed_bias:.2f} with {worst.statistics.count} members"
    )
    share = _share(len(bad or biased), len(classes))
    if not bad:
        text = (
            f"{share} a channel bias, too small to matter: {enlarged}, and images suffer from "
            f"about {BIAS_THRESHOLD} on. Any rule will do."
        )
        return Finding("good", "Bias", text)
    text = (
        f"{share} a channel bias that rules without a mean split enlarge until images fade or take "
        f"on a tint, from about {BIAS_THRESHOLD} on: {enlarged}. Take a rule with /chm, such as "
        "fade/chm, or with /lp where many members have a common layout."
    )
    return Finding("warning", "Bias", text)


def _share(some: int, total: int) -> str:
    """Begin a sentence on some of the classes."""
    if total == 1:
        return "The class has"
    if some == total:
        return f"All {total} classes have"
    return f"{some} of {total} classes {'has' if some == 1 else 'have'}"


def norm_finding(mean: float, count: int, dim: int, inversion: str) -> Finding:
    """Say whether latents are as long as white noise.

    Args:
        mean: mean of ‖z‖/√D.
        count: number of latents.
        dim: number D of elements of each.
        inversion: see `findings`.
    """
    law, deviation = norm_law(dim)
    numbers = f"norm over √D {mean:.3f}, by the chi law {law:.3f} ± {deviation:.3f} each"
    sigmas = (mean - law) / deviation * math.sqrt(count)
    if abs(mean - law) < NORM_TOLERANCE or abs(sigmas) < 4:
        return Finding("good", "Norm", f"Latents are as long as white noise: {numbers}.")
    word = "shorter" if mean < law else "longer"
    text = (
        f"Latents are {abs(mean / law - 1):.0%} {word} than white noise ({numbers}). Centroids by "
        "fix and vp have the length of noise all the same (√D), by nin that of their members; by "
        "fade they are between: like a member where one dominates, like noise where many mix."
    )
    text += _unless(inversion, "forward_start", "Latents of forward_start have the length.")
    return Finding("warning", "Norm", text)


def _unless(inversion: str, method: str, advice: str) -> str:
    """Return a sentence of advice to use an inversion, unless it was used."""
    return "" if inversion.startswith(method) else f" {advice}"


def _correlation_finding(classes: Sequence[ClassHealth], inversion: str) -> list[Finding]:
    """Say that neighbouring pixels correlate, if they do."""
    across = fmean(c.statistics.horizontal for c in classes)
    down = fmean(c.statistics.vertical for c in classes)
    if max(abs(across), abs(down)) < CORRELATION_THRESHOLD:
        return []
    text = (
        f"Neighbouring pixels of the latents correlate, {across:+z.2f} across and {down:+z.2f} "
        "down (white noise 0): they still hold something of their images, which no rule removes."
    )
    text += _unless(inversion, "forward_start", "Latents of forward_start are nearest to noise.")
    return [Finding("warning", "Correlation", text)]


def reconstruction_finding(db: float, inversion: str, of_worst: str = "") -> Finding:
    """Say how well images come back.

    Args:
        db: mean PSNR of images sampled back, in dB.
        inversion: see `findings`.
        of_worst: a clause on the worst class.
    """
    text = f"Images come back at {db:.1f} dB (PSNR) on average{of_worst}"
    if db >= MIN_PSNR:
        return Finding("good", "Reconstruction", text + ".")
    text += f": the latents of {inversion} do not hold them well. Invert with more steps."
    text += _unless(inversion, "fireflow", "fireflow gives images back best.")
    return Finding("warning", "Reconstruction", text)
