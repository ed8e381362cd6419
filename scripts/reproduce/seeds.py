"""Norms of seeds against quality, and the norm-aware centroid against the usual ones.

    python scripts/reproduce/seeds.py --quick
    python scripts/reproduce/seeds.py

Samuel et al., *Norm-guided latent space exploration*, arXiv 2306.08687, call a latent a seed. Their
Fig. 2: samples of noises scaled to another norm; FID is best near the likeliest one. Their Table 1:
centroids of inverted images in equal parts, Euclidean (lin/0), normalised Euclidean (fix/0),
spherical (slerp/0) and NAO; here with our splits too. The work compares schedulers: the same
centroids are sampled by each of our solvers. Walks are in ``walks.py``.

In that work the centroid minimises a plain sum of distances, without weights. That it sticks to its
heaviest latent at unequal weights is about our weighted reading of it, not about the work.
"""

import torch
from claims import once, options, record, sized
from degeneracy import make, measure
from judge import bootstrap, ci95, error_bars, gain, open_judge, pictures
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from works import Interval

from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.core.rng import normal, rng
from augment.diffusion import load_backbone
from augment.diffusion.sampling import Sampling
from augment.diffusion.solver import sample
from augment.measure.features import diversity, frechet_distance
from augment.synthesis.synthesizer import Synthesizer

SCALES = (0.7, 0.85, 0.95, 1.0, 1.05, 1.15, 1.3)
RULES = {"lin/0": "Euclidean", "fix/0": "normalised Euclidean", "slerp/0": "spherical",
         "nao/0": "NAO", "fix/chm": "ours", "nao/chm": "ours"}  # fmt: skip
SOLVERS = ("dpm++", "midpoint", "fireflow")  # beside DDIM
MEMBERS = 5


def main() -> None:
    """Scale, mix, sample, measure, draw, judge."""
    args = options("Norms and centroids of seeds: arXiv 2306.08687.", "seeds").parse_args()
    noises, per_class, draws, steps = sized(
        args, (8, 5, 2, 2), (120, 16, 8, 20), (1000, 64, 40, 50)
    )
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
    scaled: dict[float, Tensor] = {}
    for scale in tqdm(SCALES, "norms"):
        images = once(
            args.out / f"norm-{tag}-{noises}-{scale}.safetensors",
            lambda s=scale: {"images": sample(backbone, s * drawn + mean, None, "ddim", steps)},
        )["images"]
        scaled[scale] = judge.network(images)
    cells = {}
    jobs = [(rule, "ddim") for rule in RULES]
    jobs += [(rule, solver) for solver in SOLVERS for rule in ("lin/0", "nao/0")]
    for rule, solver in tqdm(jobs, "centroids"):
        how = Sampling(solver=solver, steps=max(steps // (2 if solver == "midpoint" else 1), 1))
        synthesizer = Synthesizer(backbone, bank, Rule.parse(rule), how)
        made = once(
            args.out / f"{rule.replace('/', '-')}-{solver}-{tag}-{draws}.safetensors",
            lambda s=synthesizer: make(s, MEMBERS, draws),
        )
        cells[rule, solver] = measure(made, judge, len(bank.classes), per_class=False)
    rows = []
    for (rule, solver), cell in cells.items():
        grouped = cell["features"].unflatten(0, (-1, len(bank.classes)))
        variety = sum(diversity(part) for part in grouped.unbind(1)) / len(bank.classes)
        rows.append({
            "rule": rule, "of": RULES[rule], "solver": solver,
            "class kept, %": ci95(cell["kept"], 100), "FID": judge.fid(cell["features"]),
            "class distance": cell["distance"].mean().item(), "diversity": variety,
        })  # fmt: skip
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    again = 20 if args.toy else 100
    spread = [
        bootstrap(lambda rows, f=f: frechet_distance(f[rows], judge.real), len(f), again)
        for f in scaled.values()
    ]
    error_bars(axes, SCALES, spread, "o-")
    axes.axvline(1, color="grey", lw=0.8, ls=":")
    axes.set(title=f"FID of {noises} samples, ± 95 %", xlabel="norm of the noise, over √D")
    figure.savefig(args.out / "norms.png", dpi=120)
    nao = cells["nao/0", "ddim"]

    def worse(one: Tensor, other: Tensor) -> Interval:
        return bootstrap(
            lambda rows: frechet_distance(one[rows], judge.real)
            - frechet_distance(other[rows], judge.real),
            len(one), again,
        )  # fmt: skip

    others = {rule: cells[rule, "ddim"] for rule in list(RULES)[:3]}
    found = {
        "na-norm": {f"{scale:g}": worse(scaled[scale], scaled[1.0]) for scale in (0.85, 1.15)},
        "na-kept": {RULES[rule]: gain(nao["kept"], cell["kept"]) for rule, cell in others.items()},
        "na-fid": {
            RULES[rule]: worse(cell["features"], nao["features"]) for rule, cell in others.items()
        },
        "na-solvers": {
            solver: gain(cells["nao/0", solver]["kept"], cells["lin/0", solver]["kept"])
            for solver in ("ddim", *SOLVERS)
        },
    }
    scores = ", ".join(f"{scale:g}: {judge.fid(f):.1f}" for scale, f in scaled.items())
    title = (
        f"centroids of {MEMBERS} of {per_class} images, {draws} a class and row, DDIM {steps}. "
        f"FID of {noises} samples by the norm of their noise over √D: {scores}"
    )
    record(args, title, rows, found, norms="FID against the norm of the noise")


if __name__ == "__main__":
    main()
