"""Does filling up the tail help where the backbone knows *other* classes? CIFAR-FS, long-tailed.

    python scripts/long_tail_bed.py CIFAR100
    python scripts/long_tail_bed.py CIFAR100 --quick

CIFAR-100-LT itself cannot be had with this backbone, which saw all images of 64 of its classes. So
the 20 novel classes of ``scripts/test_bed.py`` are made long-tailed as CIFAR-100-LT is (Cao et al.,
arXiv 1906.07413): 300 images of the first class in alphabetical order, 3 of the last, imbalance
100. They are tested on 200 other images of each. Every class with fewer than ``--fill-to`` images
is filled up with synthetic ones, made from its own images alone. The learner is that of the test
bed from scratch, with RandAugment and without mixup, by cross-entropy or balanced softmax (arXiv
2007.10740), whose counts are those of real and synthetic images together. All rows train for as
many steps. Gains are over the same loss without synthetic images, paired by draw; *few* are classes
of at most 20 images, *many* those of more than 100 (Liu et al., arXiv 1904.05160). Finished runs
stay in ``--out``: the same command resumes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from test_bed import LEARNERS, TESTED, WEIGHTS, Bed, Images, Row, ci95
from tqdm import tqdm

from augment import Mixing, Sampling, SyntheticDataset, fill_bank
from augment.core.files import read_json, write_bytes, write_json
from augment.diffusion.backbones.tiny import EMBEDDED
from augment.report.evaluate import markdown
from augment.sources import LongTail
from augment.training.data.draws import SyntheticMix
from augment.training.models.classifier import Classifier

LARGEST, IMBALANCE, LOSSES = 300, 100.0, ("cross_entropy", "balanced_softmax")
FEW, MANY = 20, 100
FILLINGS = (
    Row("samples by superclass", Mixing(level=1.0), guidance=2.0),
    Row("samples by references", Mixing(level=1.0, members=5), references=True, guidance=2.0),
    Row("centroids by references", Mixing(members=5), "forward_start", True, guidance=2.0),
)


class Tail(Bed):
    """The long-tailed classes, their synthetic images and their learners."""

    def real(self, seed: int) -> LongTail:
        """Return the images of a draw."""
        return LongTail(self.pool, IMBALANCE, seed, LARGEST)

    def filled(self, filling: Row, seed: int) -> Images:
        """Return the synthetic images of a draw, of classes one after the other."""
        tail, fill_to = self.real(seed), self.args.fill_to
        missing = {name: fill_to - len(ids) for name, ids in tail.ids.items() if len(ids) < fill_to}
        folder = self.out / "tail" / f"{filling.name.replace(' ', '-')}-{fill_to}-{seed}"
        path = folder / "images.safetensors"
        if not path.exists():
            assert filling.mixing
            tail.ids = {name: tail.ids[name] for name in missing}
            backbone = self.load(filling.references)
            words = {name: self.words[name] for name in missing}
            bank = fill_bank(folder / "bank", backbone, tail, words, filling.inversion, stored=())
            steps, guidance = self.args.solver_steps, filling.guidance
            how = Sampling(solver="fast", steps=steps, guidance=guidance)
            mixing = replace(filling.mixing, seed=seed)
            data = SyntheticDataset(bank, backbone, mixing, how, missing)
            images = torch.stack([x for x, _ in data.__getitems__(range(len(data)))])
            names = [data.classes[label] for label in data.targets]
            labels = torch.tensor([self.classes.index(name) for name in names])
            found = {"images": (255 * images).round().to(torch.uint8), "labels": labels}
            write_bytes(path, save(found))
        found = load_file(path)
        return Images(found["images"], self.classes, found["labels"].tolist())

    def accuracies(self, filling: Row | None, loss: str, seed: int) -> dict[str, float]:
        """Train, or read what was found before; return accuracies, also of few and many."""
        args = self.args
        name = "-".join([filling.name if filling else "none", loss, str(seed)]).replace(" ", "-")
        settings = {"steps": args.steps, "fill_to": args.fill_to if filling else None}
        done = self.out / "tail-runs" / f"{name}.json"
        if done.exists() and (found := read_json(done, "a run"))["settings"] == settings:
            return found["found"]
        real, fake, mix = self.real(seed), None, SyntheticMix()
        if filling:
            fake, mix = self.filled(filling, seed), SyntheticMix(fill_to=args.fill_to)
        learner = replace(LEARNERS[0], steps=args.steps, mixup=0.0)
        model, *_ = self.train(learner, real, fake, mix, seed, loss)
        found = self.tested_by(model, real)
        write_json(done, {"found": found, "settings": settings})
        return found

    def tested_by(self, model: Classifier, real: LongTail) -> dict[str, float]:
        """Return the accuracy on the tested images, and on those of few and of many images."""
        pixels = self.pixels(self.test)
        model.eval()
        with torch.no_grad():
            answers = torch.cat([model(part).argmax(1) for part in pixels.split(500)])
        right = answers.unflatten(0, (-1, TESTED)) == torch.arange(len(self.classes))[:, None]
        each, counts = right.double().mean(1), torch.tensor(real.counts)
        parts = {"all": counts > 0, "few": counts <= FEW, "many": counts > MANY}
        return {name: each[mask].mean().item() for name, mask in parts.items()}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="CIFAR-100's training images in class folders")
    parser.add_argument("--weights", type=Path, default=EMBEDDED["tiny-cifar"])
    parser.add_argument("--trunk", type=Path, default=WEIGHTS / "resnet12.safetensors")
    parser.add_argument("--part", choices=("validation", "novel"), default="novel")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--fill-to", type=int, default=50, help="images a class")
    parser.add_argument("--quick", action="store_true", help="two draws, 500 steps")
    parser.add_argument("--out", type=Path, default=Path("runs/long-tail-bed"))
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps = 2, 500
    args.solver_steps, args.adapt_steps, args.shots = 8, 0, [1]
    bed = Tail(args, LARGEST)
    jobs = [(f, loss, seed) for seed in range(args.seeds) for loss in LOSSES
            for f in (None, *FILLINGS)]  # fmt: skip
    found = {job: bed.accuracies(*job) for job in tqdm(jobs, unit="run", mininterval=5)}
    rows = []
    for loss in LOSSES:
        for filling in (None, *FILLINGS):
            row = {"loss": loss, "tail filled by": filling.name if filling else "nothing"}
            for key in ("all", "few", "many"):
                plain, values = (
                    [100 * found[f, loss, seed][key] for seed in range(args.seeds)]
                    for f in (None, filling)
                )
                gains = [a - b for a, b in zip(values, plain, strict=True)]
                row[key] = ci95(values) + (f" ({ci95(gains, True)})" if filling else "")
            rows.append(row)
    text = "\n".join(markdown(rows))
    print(f"\n{text}\n")
    (bed.out / "long_tail.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
