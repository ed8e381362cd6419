"""The claims of the five works as values, and the verdict that measured intervals give.

A claim says that a number lies between two bounds. It *holds* if every measured interval lies
inside, *does not hold* if one lies outside, and is *within noise* if one straddles a bound. It
*cannot be decided here* if its set-up is missing here, or if its script has not been run; the
reason is stated. Intervals are 95 %; a number without sampling is an interval of no width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

WORKS = {
    "LK": "Landolsi & Kahl, *Addressing degeneracies in latent interpolation for diffusion "
    "models*, arXiv 2505.07481",
    "SD": "Guo et al., *Smooth Diffusion*, arXiv 2312.04410",
    "RI": "Ribeiro, *Exploring the latent space of text-to-image diffusion models*, 2023",
    "ST": "Staniszewski et al., *There and back again*, arXiv 2410.23530",
    "NA": "Samuel et al., *Norm-guided latent space exploration*, arXiv 2306.08687, and "
    "*SeedSelect*, arXiv 2304.14530",
}


class Interval(NamedTuple):
    """A measured number and its 95 % interval."""

    low: float
    value: float
    high: float

    def __str__(self) -> str:
        """Return the number, with its interval where it has one."""
        if self.low == self.high:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def exact(value: float) -> Interval:
    """Return a number that has no sampling error."""
    return Interval(value, value, value)


@dataclass(frozen=True)
class Claim:
    """What a work says, and how it is decided.

    Args:
        script: the script of this folder that measures it.
        work: a key of `WORKS`.
        where: figure, table or section.
        wording: the claim, close to its sense.
        measured: the number that decides.
        above: the number is above this.
        below: the number is below this.
        undecided: why it cannot be decided here; empty if it can.
        note: why it may not hold here, or what to know of the set-up.
    """

    script: str
    work: str
    where: str
    wording: str
    measured: str
    above: float = -math.inf
    below: float = math.inf
    undecided: str = ""
    note: str = ""

    def verdict(self, found: Mapping[str, Interval]) -> str:
        """Compare intervals with the bounds."""
        if self.undecided or not found or any(math.isnan(x.value) for x in found.values()):
            return "cannot be decided here"
        if any(x.high <= self.above or x.low >= self.below for x in found.values()):
            return "does not hold"
        inside = all(self.above < x.low and x.high < self.below for x in found.values())
        return "holds" if inside else "within noise"

    @property
    def rule(self) -> str:
        """Say in words what decides."""
        bounds = [f"above {self.above:g}"] if self.above > -math.inf else []
        bounds += [f"below {self.below:g}"] if self.below < math.inf else []
        return f"{self.measured}: {' and '.join(bounds)}"


_FLOW = (
    "the model is a flow that `train_tiny.py --flow` made of `tiny` in 512 steps of 32 images, not "
    "in the package"
)
_SD35 = "it is about Stable Diffusion 3.5, and no flow model is embedded"
_TRAINING = (
    "runs of 150 steps of 16 images have not converged, where the paper trains 30 000 steps of 96"
)
_TEXT_TOWER = "no text tower is embedded, so there is no CLIP score"

CLAIMS = {
    # Landolsi & Kahl
    "fig2-lin": Claim(
        "paths", "LK", "Fig. 2", "LIN cuts the corner",
        "least norm of the path over the smaller norm of its inputs", below=0.95,
    ),
    "fig2-fix": Claim(
        "paths", "LK", "Fig. 2", "FIX does not start in its inputs",
        "distance of the path's end from its input, over √L", above=0.01,
    ),
    "fig2-slerp": Claim(
        "paths", "LK", "Fig. 2", "SLERP leaves the range of its inputs' norms near them",
        "largest norm of the path over the larger norm of its inputs, less 1", above=0.0001,
        note="SLERP is eq. 3, whose coefficients multiply the raw vectors (`raw_slerp`). "
        "Our `slerp` interpolates the norm and cannot overshoot.",
    ),
    "fig2-nin": Claim(
        "paths", "LK", "Fig. 2", "NIN starts in its inputs and does not overshoot",
        "distance from its inputs, and overshoot", below=0.00001,
    ),
    "fig3": Claim(
        "independent", "LK", "Fig. 3, §4.1",
        "FIX centroids of inverted samples degenerate although class and prompt fit the images",
        "class distance of FIX centroids of the most members, less that of the same by fix/chm",
        above=0,
        note="This comparison was chosen after the data were seen. The first one, with centroids "
        "of as many noises, is within noise (−0.006 [−0.048, 0.036]): `tiny` is not trained on "
        "pure noise.",
    ),
    "fig4": Claim(
        "degeneracy", "LK", "Fig. 4",
        "while N ≪ 1/b², the channel mean of FIX centroids grows linearly in √N",
        "exponent of N, mean over classes", above=0.4, below=0.6,
        note="Judged while N is at most a quarter of 1/δ², δ the share of the norm that a class's "
        "latents have in common; beyond, it saturates as √(N/(1 + Nδ²)), as the table shows. With "
        "our DDIM inversion in place of the published form, the exponent was 0.468 [0.433, 0.502].",
    ),
    "fig5": Claim(
        "independent", "LK", "Fig. 5",
        "a flow model without terminal signal degenerates too, so the schedule is not the only "
        "source",
        "class distance of FIX centroids of the most members, less that of as many noises; "
        f"{_FLOW}",
        above=0,
    ),
    "fig6-0": Claim(
        "offset", "LK", "Fig. 6, §4.4", "at t = 0 an offset changes only where it was added",
        "mean |change| of pixels elsewhere", below=0.000001,
    ),
    "fig6-T": Claim(
        "offset", "LK", "Fig. 6, §4.4",
        "at t = T the network reacts far more to it than the decoder does at t = 0",
        "mean |change| of pixels where it was added, at T over that at 0, less 1", above=0,
    ),
    "fig6-out": Claim(
        "offset", "LK", "Fig. 6, §4.4", "at t = T other parts change too",
        "mean |change| of pixels elsewhere", above=0.01,
    ),
    "fig7-steep": Claim(
        "degeneracy", "LK", "Fig. 7", "without a split quality falls steeply with N",
        "FID and class distance at the most members, less those at N = 2", above=0,
        note="Fig. 7's intervals are a bootstrap over centroids. With our DDIM inversion and "
        "intervals over the ten classes, all its claims are within noise.",
    ),
    "fig7-m": Claim(
        "degeneracy", "LK", "Fig. 7", "/m is slightly better than /0",
        "FID of /0 less that of /m at the most members", above=0,
    ),
    "fig7-chm": Claim(
        "degeneracy", "LK", "Fig. 7", "/chm is much better than /0",
        "FID and class distance of /0 less those of /chm at the most members", above=0,
    ),
    "fig7-chm-falls": Claim(
        "degeneracy", "LK", "Fig. 7", "/chm falls too at many members",
        "FID at the most members, less that at N = 2", above=0,
    ),
    "fig7-norms": Claim(
        "degeneracy", "LK", "Fig. 7",
        "FIX is a little better than NIN, by less than the degeneracy",
        "(FID of nin/chm less that of fix/chm) over (fix/0 less fix/chm)", above=0, below=1,
    ),
    "fig7-agree": Claim(
        "degeneracy", "LK", "Fig. 7", "FID and class distance agree",
        "rank correlation of the cells' FID and class distance", above=0.5,
    ),
    "fig7-small": Claim(
        "degeneracy", "LK", "Fig. 7", "the split gains already at few members",
        "FID of /0 less that of /chm at N = 2", above=0,
    ),
    "fig8": Claim(
        "sheets", "LK", "Fig. 8, 12", "fix/chm and nin/chm hardly differ on SD 3.5", "",
        undecided=_SD35,
    ),
    "fig9": Claim(
        "sheets", "LK", "Fig. 9", "on SD 3.5, nin/chm repairs fix/0 at N = 12, in five classes",
        "", undecided=_SD35,
    ),
    "fig10": Claim(
        "inversions", "LK", "Fig. 10",
        "FIX degenerates with many DDIM steps and no guidance, too",
        "class distance at the most members, less that at N = 2", above=0,
    ),
    "fig11": Claim(
        "inversions", "LK", "Fig. 11",
        "FIX degenerates with null-text inversion, its null embeddings mixed linearly",
        "class distance at the most members, less that at N = 2", above=0,
    ),
    # Guo et al.
    "sd-istd": Claim(
        "istd", "SD", "Table 1", "Stable Diffusion 1.5 has an ISTD of 38.63", "",
        undecided="it takes Stable Diffusion and COCO's captions: "
        "`istd.py --backbone sd15 --captions FILE` prints it",
    ),
    "sd-table1-istd": Claim(
        "smooth_diffusion", "SD", "Table 1", "smoothing makes ISTD far lower (38.63 → 16.54)",
        "ISTD of λ = 1 over that of the original", below=0.9, undecided=_TRAINING,
    ),
    "sd-table1-fid": Claim(
        "smooth_diffusion", "SD", "Table 1", "FID gets better (12.70 → 12.10)",
        "FID of λ = 1 less that of the original", below=0, undecided=_TRAINING,
    ),
    "sd-table1-clip": Claim(
        "smooth_diffusion", "SD", "Table 1", "the CLIP score gets better (31.46 → 31.54)", "",
        undecided=_TEXT_TOWER,
    ),
    "sd-fig3": Claim(
        "interpolation", "SD", "Fig. 3",
        "between real images Stable Diffusion fluctuates, and Smooth Diffusion changes smoothly",
        "", undecided=_TRAINING,
    ),
    "sd-fig3-clean": Claim(
        "interpolation", "SD", "Fig. 3",
        "interpolation of clean latents resembles that of pixels, and loses detail", "",
        undecided="`tiny`'s codec is linear, so that it interpolates pixels by construction",
    ),
    "sd-fig3-few": Claim(
        "interpolation", "SD", "Fig. 3", "ANID in 50 steps is highly blurred",
        "detail of the images between, over that of the given ones", below=0.5,
    ),
    "sd-fig3-many": Claim(
        "interpolation", "SD", "Fig. 3", "200 steps alleviate the blur",
        "detail in 200 steps less that in 50, over that of the given images", above=0,
    ),
    "sd-table2-null": Claim(
        "reconstruction", "SD", "Table 2",
        "null-text repairs the error of guided DDIM (13.97 → 25.63 dB; smoothed, 16.17 → 25.74)",
        "PSNR of null-text less that of DDIM at guidance 7.5, dB", above=0,
    ),
    "sd-table2-plain": Claim(
        "reconstruction", "SD", "Table 2",
        "null-text comes near the error of the codec (25.63 of 25.98 dB)",
        "PSNR of the codec alone less that of null-text, dB", below=1,
        note="JPEG stands for the autoencoder.",
    ),
    "sd-table2-bound": Claim(
        "smooth_diffusion", "SD", "Table 2",
        "and nearer with smoothing (25.74 of 25.98 dB)",
        "PSNR of the codec alone less that of null-text under λ = 1, dB", below=1,
        undecided=_TRAINING,
    ),
    "sd-table2-smooth": Claim(
        "smooth_diffusion", "SD", "Table 2",
        "smoothing helps guided DDIM much (+2.2 dB), null-text less (+0.1 dB)",
        "gain in PSNR of guided DDIM by smoothing, less that of null-text", above=0,
        undecided=_TRAINING,
    ),
    "sd-table3": Claim(
        "smooth_diffusion", "SD", "Table 3",
        "λ = 0.1 raises ISTD, λ = 10 lowers it and costs FID", "", undecided=_TRAINING,
    ),
    "sd-table4": Claim(
        "smooth_diffusion", "SD", "Table 4",
        "of ranks 4, 8, 16 rank 8 has the least ISTD; all weights have less, at a worse FID", "",
        undecided=_TRAINING,
    ),
    "sd-editing": Claim(
        "smooth_diffusion", "SD", "Fig. 5", "smoothing preserves what an edit does not name", "",
        undecided="editing has no measure there, and no captions are embedded",
    ),
    # Ribeiro
    "ri-linear": Claim(
        "walks", "RI", "InterpScore",
        "linear interpolation scores best, above normalised and spherical, which shows that CLIP "
        "scores misjudge", "InterpScore of lerp less that of the other", above=0,
    ),
    "ri-pan": Claim(
        "walks", "RI", "translation", "translating a window over two latents moves the picture",
        "shift of neighbouring images over the window's", above=0.5, below=1.5,
        note="`tiny` draws one centred object, whatever the noise.",
    ),
    "ri-style": Claim(
        "walks", "RI", "translation", "its style changes on the way", "",
        undecided="style has no measure here",
    ),
    "ri-text": Claim(
        "texts", "RI", "text interpolation",
        "one noise and interpolated text embeddings give coherent pictures",
        "distance to the nearest real image, between two prompts over that at the prompts",
        below=1.25,
        note="`tiny` has learned four labels, and nothing between them: outlines stay whole, and "
        "surfaces dissolve.",
    ),
    "ri-prompts": Claim(
        "texts", "RI", "one latent, four prompts", "background, pose and clothes stay", "",
        undecided="`tiny` draws clothes alone, without background or pose",
    ),
    # Staniszewski et al.
    "st-correlation": Claim(
        "relations", "ST", "Table 1",
        "pixels of DDIM latents correlate more than those of noise (pixel models: .462 against "
        ".159, .219 against .177; a latent model: .179 against .177)",
        "top-10 correlation of latents less that of noise", above=0,
    ),
    "st-sample": Claim(
        "relations", "ST", "Table 1", "and less than those of samples (.986, .966, .904)",
        "top-10 correlation of samples less that of latents", above=0,
    ),
    "st-x0": Claim(
        "relations", "ST", "assignment",
        "of a sample, the nearest noise by L2 is its own, at any number of steps (≈ 100 %)",
        "share of centred samples", above=0.8,
        note="Each set less its mean: `tiny`'s samples are not centred, and raw L2 pairs few. In "
        "its 1024 dimensions the squared norms of noises scatter by 42, and twice the product of a "
        "sample and its own noise is 117. So among many noises a shorter one is nearer: at 10 "
        "steps, L2 finds 73 % of 32, 61 % of 64 and 29 % of 320. By cosine nearly all find their "
        "own.",
    ),
    "st-xT": Claim(
        "relations", "ST", "assignment",
        "of a noise, the nearest sample is its own less often with more steps (pixel DDPM: 100 → "
        "43 %)", "share at many steps less that at few, centred", below=0,
    ),
    "st-way": Claim(
        "relations", "ST", "trajectory",
        "sampling comes nearer to the latent, and passes it at 50 to 70 % of its steps",
        "share of the steps at which it is nearest, published DDIM", above=0.5, below=0.7,
        note="The share falls with the number of steps, as the inversion gets better. By our DDIM, "
        "which inverts better, it is smaller still.",
    ),
    "st-tuning": Claim(
        "training_map", "ST", "training", "the map from noise to sample is settled early in "
        "training", "share of noises whose sample after a quarter of the steps is nearest to "
        f"their own last one, of all last samples; {_FLOW}", above=0.8,
    ),
    # Samuel et al.
    "na-norm": Claim(
        "seeds", "NA", "Fig. 2", "FID is best near the likeliest norm, √(D − 1)",
        "FID at 0.85 and 1.15 of it, less that at 1.00", above=0,
    ),
    "na-models": Claim(
        "norms", "NA", "next check", "inverted images have the likeliest norm in several models",
        "mean norm over √(D − 1), published DDIM", above=0.95, below=1.05,
        note="The exact network of `gaussian` has no other norm, so it is the inversion that "
        "shortens latents; `forward_start` does not.",
    ),
    "na-kept": Claim(
        "seeds", "NA", "Table 1", "NAO's centroid keeps the class better than the others",
        "share of kept classes less that of the other", above=0,
        note="NAO's centroid of equal parts is the normalised Euclidean one; see below.",
    ),
    "na-fid": Claim(
        "seeds", "NA", "Table 1", "and has the better FID", "FID of the other less that of NAO",
        above=0, note="NAO's centroid of equal parts is the normalised Euclidean one; see below.",
    ),
    "na-walks": Claim(
        "walks", "NA", "Table 1", "NAO's paths keep the class better than lerp and slerp",
        "share of kept classes less that of the other", above=0,
    ),
    "na-solvers": Claim(
        "seeds", "NA", "schedulers", "the gain over the Euclidean centroid is the same by every "
        "solver", "share of kept classes of NAO less that of lin/0, by solver", above=0,
        note="The work has DDIM, DEIS and Heun; here are this package's solvers.",
    ),
    "na-tail": Claim(
        "shots", "NA", "few shots", "on classes of few images NAO's centroids, refined, are above "
        "SeedSelect from noise", "accuracy with as many images of NAO, less that of SeedSelect",
        above=0,
        note="A class gets 2 synthetic images: refining noise takes seconds an image.",
    ),
    "na-lt": Claim(
        "seeds", "NA", "ImageNet-LT", "78.9 % on ImageNet-LT", "",
        undecided="it takes ImageNet and GPUs; `configs/seedselect_imagenet_lt.yaml` has its "
        "protocol as far as it is known",
    ),
    "ss-loss": Claim(
        "seedselect", "NA", "SeedSelect", "30 steps from noise make the loss fall",
        "loss before less after", above=0,
    ),
    "ss-class": Claim(
        "seedselect", "NA", "SeedSelect", "and the class comes out",
        "share of images of the class after less before, by the network and by pixels", above=0,
    ),
    "ss-five": Claim(
        "seedselect", "NA", "§4", "5 steps from a centroid reach what 30 do from noise",
        "loss after 30 steps from noise, less that after 5 from a centroid", above=0,
    ),
    "ss-path": Claim(
        "seedselect", "NA", "§4", "SeedSelect begins from places of NAO's paths as well as from "
        "its centroids", "loss after 5 steps from a place, less that from a centroid", below=0.1,
    ),
    "ss-memory": Claim(
        "seedselect", "NA", "SeedSelect", "memory hardly grows with the solver's steps",
        "growth with layers recomputed over that without", below=0.1,
        note="Resident memory of one step of 16 latents: 93 MB by 4 solver steps and 175 by 16, "
        "where without recomputing it is 232 and 838.",
    ),
}  # fmt: skip
"""Claims by key; a record of a run names them by it."""
