"""Few shots: NAO's centroids against SeedSelect from noise, and how diverse centroids are.

    python scripts/reproduce/shots.py --quick
    python scripts/reproduce/shots.py

Samuel et al., *Norm-guided latent space exploration*, arXiv 2306.08687: on classes of few images,
training with SeedSelect's images is worse than with images that begin from NAO's centroids. Here as
in ``scripts/few_shot_table.py``, whose network, shots and test images these are, of embedded
Fashion-MNIST. Noise is refined in 30 steps of 0.1, a centroid in 5 of 0.05, and both by the
features of the shots alone. The work leaves open how shots and diversity are related, so plain
centroids stand beside them, by number of shots.

FID, NDB and entropy are of the synthetic images of all seeds. NDB (Richardson & Weiss, arXiv
1805.12462) is the share of clusters of the test images' features that hold significantly more or
fewer of the synthetic images, at 5 %; so few images differ in few clusters. Entropy is that of the
shares, over the most it can be.
"""

import math
from typing import Any

import torch
from claims import once, options, record, sized
from few_shot_table import BASE, FewShotBench, Images, Row
from judge import FeatureJudge, ci95, gain, open_judge
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor
from tqdm import tqdm

from augment import Mixing
from augment.sources import FewShot, Slice, Source
from augment.synthesis.refine import SeedSelect

MIXING = Mixing(rule="nao/0")


class Bench(FewShotBench):
    """The bench of the few-shot table, of a part of its images; keeps the synthetic ones."""

    def fashion(self) -> tuple[Source, Source]:
        """See the parent."""
        pool, test = super().fashion()
        return Slice(pool, last=self.args.pool), test

    def images(self, row: Row, shots: int, seed: int) -> Tensor:
        """Return the synthetic images of a run, of the classes in turn."""
        real, name = FewShot(self.pool, shots, seed), row.name.replace(" ", "-").replace("/", "-")

        def make() -> dict[str, Tensor]:
            made, _ = super(Bench, self).synthetic(row, real, seed)
            return {"images": torch.stack([made[index][0] for index in range(len(made))])}

        stem = f"{name}-{shots}-{seed}-{row.per_class}"
        return once(self.out / "images" / f"{stem}.safetensors", make)["images"]

    def synthetic(self, row: Row, real: Source, seed: int) -> tuple[Any, float]:
        """See the parent."""
        if row.kind == "none":
            return None, 0.0
        return Images(self.images(row, real.counts[0], seed), len(self.names)), 0.0


def bins(judge: FeatureJudge, images: Tensor, count: int) -> tuple[float, float]:
    """Return NDB, as a share of ``count`` clusters of real features, and entropy."""
    real = judge.real.double().numpy()
    centres, labels = kmeans2(real, count, seed=0, minit="++")
    found, _ = vq(judge.network(images).double().numpy(), centres)
    there, here = (
        torch.from_numpy(rows).bincount(minlength=count).double() for rows in (labels, found)
    )
    n, m = there.sum(), here.sum()
    p, q, pooled = there / n, here / m, (there + here) / (n + m)
    z = (p - q).abs() / (pooled * (1 - pooled) * (1 / n + 1 / m)).sqrt().clamp_min(1e-12)
    entropy = -(q * q.clamp_min(1e-12).log()).sum() / math.log(count)
    return (z > 1.96).double().mean().item(), entropy.item()


def main() -> None:
    """Synthesise, train, measure, judge."""
    args = options("Few shots and diversity: arXiv 2306.08687.", "shots").parse_args()
    args.pool, shots, seeds, each, refined, clusters, steps, refining = sized(
        args, (2, (2,), 2, 1, 1, 3, 2, 1), (8, (2, 5), 3, 10, 2, 20, 150, 30),
        (32, (1, 2, 5, 10, 20), 5, 30, 10, 50, 300, 30),
    )  # fmt: skip
    tail = shots[-1] if args.quick else shots[len(shots) // 2]
    noise = Row("SeedSelect", "noises", MIXING, per_class=refined, refine=SeedSelect(refining, 0.1))
    nao = Row(
        "nao/0, SeedSelect",
        "centroids",
        MIXING,
        per_class=refined,
        refine=SeedSelect(min(refining, 5)),
    )
    rows = [(Row(BASE), tail), (noise, tail), (nao, tail)]
    rows += [(Row("centroids nao/0", "centroids", MIXING, per_class=each), n) for n in shots]
    args.data, args.tune, args.lora = "fashion", False, None
    bench = Bench(args)
    bench.steps = steps
    judge = open_judge(args, bench.backbone, bench.test)
    accuracy, table = {}, []
    for row, n in tqdm(rows, "rows"):
        runs = [bench.run(row, n, seed) for seed in range(seeds)]
        accuracy[row.name, n] = torch.tensor([run["accuracy"] for run in runs])
        line = {"row": row.name, "shots": str(n), "accuracy, %": ci95(accuracy[row.name, n], 100)}
        if row.kind != "none":
            images = torch.cat([bench.images(row, n, seed) for seed in range(seeds)])
            ndb, entropy = bins(judge, images, clusters)
            line |= {"images": str(len(images)), "FID": judge.fid(judge.network(images))}
            line |= {"NDB": ndb, "entropy": entropy}
        table.append(line)
    table = [dict.fromkeys(table[1], "") | line for line in table]
    claimed = gain(accuracy[nao.name, tail], accuracy[noise.name, tail])
    title = (
        f"few shots of Fashion-MNIST, {seeds} seeds, {steps} steps of training; NDB and entropy "
        f"by {clusters} clusters"
    )
    record(args, title, table, {"na-tail": {f"{tail} shots": claimed}})


if __name__ == "__main__":
    main()
