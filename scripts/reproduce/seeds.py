"""Norms of seeds against quality, and the norm-aware centroid against the usual ones.

    python scripts/reproduce/seeds.py --quick
    python scripts/reproduce/seeds.py

Samuel et al., *Norm-guided latent space exploration*, arXiv 2306.08687, call a latent a seed. Their
Fig. 2: samples of noises scaled to another norm; FID is best at the likely norm. Their Table 1:
centroids of inverted images in equal parts, Euclidean (lin/0), normalised Euclidean (fix/0),
spherical (slerp/0) and NAO; here with our splits too. Walks are in ``walks.py``.
"""

import time

import torch
from claims import claim, conclude, once, options
from degeneracy import make, measure
from judge import better, ci95, mean_and_error, open_judge, pictures
from matplotlib.figure import Figure
from tqdm import tqdm

from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.core.rng import normal, rng
from augment.diffusion import load_backbone
from augment.diffusion.solver import sample
from augment.measure.features import diversity, precision_recall
from augment.plan.mixing import Mixing
from augment.plan.planner import Planner
from augment.synthesis.synthesizer import Synthesizer

SCALES = (0.5, 0.7, 0.85, 0.95, 1.0, 1.05, 1.15, 1.3, 1.5)
RULES = {"lin/0": "Euclidean", "fix/0": "normalised Euclidean", "slerp/0": "spherical",
         "nao/0": "NAO", "fix/chm": "ours", "nao/chm": "ours", "fade/chm": "ours"}  # fmt: skip
MEMBERS = 5


def main() -> None:
    """Scale, mix, sample, measure, draw, judge."""
    args = options("Norms and centroids of seeds: arXiv 2306.08687.", "seeds").parse_args()
    noises, per_class, draws, steps = (200, 16, 8, 20) if args.quick else (1000, 64, 40, 50)
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, per_class)
    judge = open_judge(args, backbone, reference)
    tag = f"{backbone.fingerprint['weights'][:8]}-{steps}"
    bank = fill_bank(
        args.out / f"bank-{tag}", backbone, source, None, "ddim", steps=steps, stored=()
    )
    # noise at the last level has this mean in training
    mean = torch.cat([bank.latents(name) for name in bank.classes]).mean((0, 2, 3))[:, None, None]
    drawn = normal(rng(0, "noise"), noises, *backbone.latent_shape)
    rows, quality = [], []
    for scale in tqdm(SCALES, "norms"):
        images = once(
            args.out / f"norm-{tag}-{noises}-{scale}.safetensors",
            lambda s=scale: {"images": sample(backbone, s * drawn + mean, None, "ddim", steps)},
        )["images"]
        features = judge.network(images)
        kept = precision_recall(judge.real, features)["precision"].double().mean().item()
        quality.append((judge.fid(features), kept))
    cells = {}
    for rule in tqdm(RULES, "centroids"):
        synthesizer = Synthesizer(backbone, bank, Rule.parse(rule))
        planner = Planner(bank.members, Mixing(seed=0, alpha=float("inf"), members=MEMBERS))
        begun = time.perf_counter()
        for index in range(20):
            synthesizer.centroid(planner(0, index))
        spent = (time.perf_counter() - begun) / 20
        made = once(
            args.out / f"{rule.replace('/', '-')}-{tag}-{draws}.safetensors",
            lambda s=synthesizer: make(s, MEMBERS, draws),
        )
        cell = cells[rule] = measure(made, judge, len(bank.classes))
        grouped = cell["features"].unflatten(0, (-1, len(bank.classes)))
        variety = sum(diversity(part) for part in grouped.unbind(1)) / len(bank.classes)
        rows.append({
            "rule": rule, "theirs": RULES[rule], "class kept, %": ci95(cell["kept"], 100),
            "FID": cell["fid"].item(), "class distance": cell["distance"].mean().item(),
            "diversity": variety, "ms a centroid": 1000 * spent,
        })  # fmt: skip
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2), zip(*quality, strict=True), ("FID", "precision"), strict=True
    ):
        axes.plot(SCALES, values, "o-")
        axes.axvline(1, color="grey", lw=0.8, ls=":")
        axes.set(title=f"{title} of {noises} samples", xlabel="norm of the noise, over √D")
    figure.savefig(args.out / "norms.png", dpi=120)
    best = min(range(len(SCALES)), key=lambda k: quality[k][0])
    listed = ", ".join(f"{s:g}: {q[0]:.1f}" for s, q in zip(SCALES, quality, strict=True))
    claims = [claim("FID is best at the likely norm", listed, 0.9 < SCALES[best] < 1.1)]
    ours = cells["nao/0"]
    for rule in list(RULES)[:3]:
        share = [mean_and_error(cell["kept"], 100)[0] for cell in (ours, cells[rule])]
        claims.append(claim(
            f"NAO keeps the class better than the {RULES[rule]} centroid",
            "{:.0f} against {:.0f} %".format(*share), better(ours["kept"], cells[rule]["kept"]),
        ))  # fmt: skip
        fids = [cell["fid"].item() for cell in (ours, cells[rule])]
        near = abs(fids[0] - fids[1]) < 0.05 * max(fids)
        claims.append(claim(
            f"and has the better FID than the {RULES[rule]} one",
            "{:.1f} against {:.1f}".format(*fids), None if near else fids[0] < fids[1],
        ))  # fmt: skip
    conclude(args, rows, claims)


if __name__ == "__main__":
    main()
