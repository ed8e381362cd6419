"""What a bank's latents are like, class by class, and what that means in plain sentences.

All of it by `augment.measure`; each class's latents are read once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.centroid import Rule
from augment.centroid.prior import nominal_norm
from augment.core.rng import rng
from augment.measure.bias import BIAS_THRESHOLD, predicted_bias
from augment.measure.latents import LatentStatistics, latent_statistics
from augment.measure.reconstruction import psnr

NORM_OFF = 0.02
"""By how much a mean norm over √D may be off 1 before it is spoken of."""
CORRELATED = 0.05  # neighbouring pixels, before it is spoken of; DDIM's latents have 0.1 and more
POOR_DB = 20.0  # PSNR of images sampled back; every inversion here is well above
DRAWS = 16  # of members, for each number of them that is measured
MOST_MEMBERS = 128  # that are mixed to measure


@dataclass(frozen=True)
class ClassHealth:
    """What was measured of a class.

    Args:
        name: of the class.
        statistics: of its latents.
        norms: ‖z‖/√D of each latent.
        psnrs: how well each image comes back, in dB, in the order of the bank's members; None if
            the bank has not kept it.
    """

    name: str
    statistics: LatentStatistics
    norms: tuple[float, ...]
    psnrs: tuple[float, ...] | None

    @property
    def grown(self) -> float:
        """The largest |channel mean| that ``fix/0`` makes of all its latents in equal parts."""
        return predicted_bias(self.statistics, self.statistics.count, math.inf)

    @property
    def psnr(self) -> float | None:
        """Of the mean squared error of its images sampled back, in dB."""
        if self.psnrs is None:
            return None
        return psnr(fmean(10 ** (-value / 10) for value in self.psnrs))

    def row(self) -> dict[str, Any]:
        """What the table shows of it."""
        s = self.statistics
        return {
            "name": self.name,
            "count": s.count,
            "bias": round(s.largest[0], 4),
            "biased": s.biased,
            "grown": round(self.grown, 4),
            "norm": round(s.norm, 4),
            "sigmas": round(s.norm_sigmas, 2),
            "psnr": None if self.psnr is None else round(self.psnr, 2),
        }


def measure(bank: LatentBank, name: str) -> ClassHealth:
    """Measure a class of a bank.

    Raises:
        UserError: a chunk is damaged, or a latent is not finite.
    """
    latents = bank.latents(name)
    found = latent_statistics(latents)
    norms = latents.flatten(1).norm(dim=1) / nominal_norm(found.dim)
    kept = "errors" in bank.manifest.keeps
    psnrs = tuple(map(psnr, bank.errors(name).tolist())) if kept else None
    return ClassHealth(name, found, tuple(norms.tolist()), psnrs)


def evenly(classes: Sequence[ClassHealth], most: int) -> list[ClassHealth]:
    """At most so many classes, from the most to the least that ``fix/0`` makes of their bias.

    The ends are among them, and the others evenly spread between, so that one sees all there is.
    """
    order = sorted(classes, key=lambda c: -c.grown)
    if most >= len(order):
        return order
    step = (len(order) - 1) / max(most - 1, 1)
    return [order[round(place * step)] for place in range(most)]


class Measured(NamedTuple):
    """The channel that is biased most, in centroids of N members in equal parts, by a rule."""

    members: int
    bias: float


def measured_bias(
    latents: Float[Tensor, "n c h w"], rule: str, numbers: Sequence[int]
) -> list[Measured]:
    """What a rule does to the largest channel mean of a class, for numbers of members.

    Args:
        latents: of the class.
        rule: such as ``fix/0``.
        numbers: of members; each is the mean of `DRAWS` draws of so many.
    """
    channel = latents.mean((0, 2, 3)).abs().argmax()
    found = []
    for number in numbers:
        dice = rng(0, "order", number)
        draws = DRAWS if number < len(latents) else 1
        rows = torch.stack(
            [torch.from_numpy(dice.permutation(len(latents))[:number]) for _ in range(draws)]
        )
        weights = torch.full((draws, number), 1 / number)
        centroids = Rule.parse(rule)(latents[rows], weights)
        found.append(Measured(number, centroids[:, channel].mean().abs().item()))
    return found


def numbers_of_members(count: int) -> list[int]:
    """Numbers of members to look at, about √2 apart, up to those that a class has."""
    usual = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, MOST_MEMBERS)
    most = min(count, MOST_MEMBERS)
    return sorted({n for n in usual if n <= most} | {most})


class Finding(NamedTuple):
    """A sentence on the bank's health.

    Attributes:
        level: ``good``, or ``mind``: there is something to see to.
        topic: what it is about, in a word.
        text: what is so, and which rule or setting cures it.
    """

    level: str
    topic: str
    text: str


def findings(bank: LatentBank, classes: Sequence[ClassHealth]) -> list[Finding]:
    """All there is to say, what is wrong first."""
    told = [bias_finding(classes), norm_finding(classes), *correlation_finding(classes)]
    told += [*reconstruction_finding(bank, classes), *single_finding(classes)]
    return sorted(told, key=lambda finding: finding.level == "good")


def bias_finding(classes: Sequence[ClassHealth]) -> Finding:
    """Whether rules without a mean split are safe."""
    biased = [c for c in classes if c.statistics.biased]
    bad = [c for c in biased if c.grown >= BIAS_THRESHOLD]
    if not biased:
        told = "No class has a significant channel bias: any rule will do."
        return Finding("good", "Bias", told)
    worst = max(biased, key=lambda c: c.grown)
    (mean, error), count = worst.statistics.largest, worst.statistics.count
    grown = (
        f"the {mean:.2f} ± {error:.2f} of {worst.name} to {worst.grown:.2f} with {count} members"
    )
    if not bad:
        told = (
            f"{share(biased, classes)} a channel bias, too small to do harm: fix/0 would enlarge "
            f"{grown}, and images suffer from about {BIAS_THRESHOLD} on. Any rule will do."
        )
        return Finding("good", "Bias", told)
    told = (
        f"{share(bad, classes)} a channel bias that rules without a mean split enlarge until "
        f"images fade or take on a tint, from about {BIAS_THRESHOLD} on: fix/0 would enlarge "
        f"{grown}. Take a rule with /chm, such as fade/chm, or with /lp where many members have a "
        "common layout."
    )
    return Finding("mind", "Bias", told)


def share(some: Sequence[Any], all_: Sequence[Any]) -> str:
    """How many classes have something, as the beginning of a sentence."""
    if len(all_) == 1:
        return "The class has"
    if len(some) == len(all_):
        return f"All {len(all_)} classes have"
    return f"{len(some)} of {len(all_)} classes {'has' if len(some) == 1 else 'have'}"


def norm_finding(classes: Sequence[ClassHealth]) -> Finding:
    """Whether latents are as long as white noise."""
    norms = [norm for c in classes for norm in c.norms]
    mean, (law, spread) = fmean(norms), classes[0].statistics.norm_law
    sigmas = (mean - law) / spread * math.sqrt(len(norms))
    told = f"norm over √D {mean:.3f}, by the chi law {law:.3f} ± {spread:.3f} each"
    if abs(mean - law) < NORM_OFF or abs(sigmas) < 4:
        return Finding("good", "Norm", f"Latents are as long as white noise: {told}.")
    word = "shorter" if mean < law else "longer"
    return Finding(
        "mind",
        "Norm",
        f"Latents are {abs(mean / law - 1):.0%} {word} than white noise ({told}). fix and vp bring "
        "centroids to √D all the same; nin keeps the length of the members, and fade goes from "
        "that, where one image is nearly alone, to √D. Latents of forward_start have the length.",
    )


def correlation_finding(classes: Sequence[ClassHealth]) -> list[Finding]:
    """Whether neighbouring pixels are alike, if they are."""
    pairs = [(c.statistics.horizontal, c.statistics.vertical) for c in classes]
    across, down = (fmean(values) for values in zip(*pairs, strict=True))
    if max(abs(across), abs(down)) < CORRELATED:
        return []
    return [
        Finding(
            "mind",
            "Correlation",
            f"Neighbouring pixels of the latents correlate, {across:+.2f} across and {down:+.2f} "
            "down (white noise 0): they still hold something of their images, which no rule mends. "
            "Latents of forward_start are nearest to noise.",
        )
    ]


def reconstruction_finding(bank: LatentBank, classes: Sequence[ClassHealth]) -> list[Finding]:
    """How well images come back, if the bank knows."""
    known = {c.name: c.psnr for c in classes if c.psnr is not None}
    if not known:
        return []
    mean, worst = fmean(known.values()), min(known, key=lambda name: known[name])
    told = f"come back at {mean:.1f} dB (PSNR) on average, {known[worst]:.1f} dB in class {worst}"
    if mean >= POOR_DB:
        return [Finding("good", "Reconstruction", f"Images {told}.")]
    method, steps = (bank.inversion[key] for key in ("method", "steps"))
    return [
        Finding(
            "mind",
            "Reconstruction",
            f"Images {told}: the latents of {method} with {steps} steps do not hold them well. "
            "Invert with more steps, or with fireflow, which gives images back best.",
        )
    ]


def single_finding(classes: Sequence[ClassHealth]) -> list[Finding]:
    """Classes that have nothing to mix."""
    single = [c.name for c in classes if c.statistics.count == 1]
    if not single:
        return []
    return [
        Finding(
            "mind",
            "Single images",
            f"{share(single, classes)} one image, such as {single[0]}: there is nothing to mix, "
            "and every centroid is that image again.",
        )
    ]
