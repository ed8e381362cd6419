"""Does a smoothed backbone walk more evenly, invert better, and make centroids that keep the class?

    python scripts/reproduce/smooth_diffusion.py --quick      # 8 runs of 150 steps, half an hour
    python scripts/reproduce/smooth_diffusion.py              # 8 runs of 2000 steps, hours

Guo et al., *Smooth Diffusion*, arXiv 2312.04410: ISTD, FID and reconstruction (their Tables 1 and
2, and the ablations of λ and rank). Every run starts from the same backbone and draws the same
images; `λ 0` is trained without the regulariser. With ``tiny`` the images are Fashion-MNIST's
training split, the prompts are those of its training, and λ goes up to 100, because v is about 0.09
there and the regulariser is proportional to its square. Few steps need a high rate: 3e-3 for LoRA
and 3e-4 for all weights with ``--quick``, otherwise 1e-3 and 1e-4. The paper has 1e-4 for 30 000
steps of 96 images; here a step has 16. Interrupt it at any time: the same command resumes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from claims import once, options, record, sized
from judge import FeatureJudge, ci95, gain, load_all, mean, open_judge, pictures, show
from matplotlib.figure import Figure
from reconstruction import WAYS, after_jpeg, back
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from works import Interval

from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.solver import sample
from augment.inversion import invert
from augment.measure.features import deviation, frechet_distance
from augment.measure.reconstruction import reconstruction
from augment.measure.smoothness import istd, walks
from augment.plan.mixing import Mixing
from augment.plan.planner import Planner
from augment.sources import Folder, Items, Source
from augment.sources.fashion import COARSE
from augment.sources.prompts import class_prompts
from augment.synthesis.synthesizer import Synthesizer
from augment.training.smooth.run import smooth_backbone
from augment.training.smooth.settings import SmoothSettings

RUNS: dict[str, tuple[float, int]] = {
    **{f"λ {weight:g}": (weight, 8) for weight in (0.0, 0.1, 1.0, 10.0, 100.0)},
    **{f"λ 1, rank {rank}": (1.0, rank) for rank in (4, 16)},
    "λ 1, all weights": (1.0, 0),
}
"""λ and rank of each run; rank 0 trains all weights."""


class Clothes(Dataset[tuple[Tensor, int]]):
    """Fashion-MNIST's training split."""

    def __init__(self) -> None:
        from fashion_mnist import CLASSES, load_split

        self.images, labels = load_split("train")
        self.classes, self.targets = list(CLASSES), labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


class Study:
    """The noises, images and judge by which all backbones are measured."""

    def __init__(self, args: argparse.Namespace, backbone: Backbone) -> None:
        self.quick, self.out = args.quick or args.toy, args.out
        self.source, reference = pictures(args, 8)
        self.judge: FeatureJudge = open_judge(args, backbone, reference)
        texts = class_prompts(self.source.classes, "a photo of a {name}")
        self.prompts = COARSE if args.backbone == "tiny" else texts
        self.real = load_all(self.source, backbone)
        self.few = slice(None, None, 8 if self.quick else 4)  # of the images, for null-text
        self.compressed, self.jpeg = after_jpeg(self.real[self.few])
        names = self.source.classes
        self.texts = [self.prompts[names[label]] for _, label in self.source.samples]
        kept = backbone.process.alpha_sigma(1)[0]
        self.mean = kept * backbone.encode(self.real).cpu().mean((0, 2, 3))
        self.steps, self.pairs, self.samples = sized(args, (2, 1, 10), (20, 2, 200), (50, 8, 1000))

    def images(self, backbone: Backbone, folder: Path) -> dict[str, Tensor]:
        """Make walks, samples, reconstructions and centroids of a backbone."""
        words = list(dict.fromkeys(self.prompts.values()))
        prompts, how = words * (self.pairs * 2), {"solver": "ddim", "steps": self.steps}
        made = {
            name: walks(backbone, prompts, mean=self.mean, name=name, **how)
            for name in (("slerp",) if self.quick else ("slerp", "lerp"))
        }
        noises = normal(rng(1, "noise"), self.samples, *backbone.latent_shape)
        texts = [self.texts[k % len(self.texts)] for k in range(self.samples)]
        made["samples"] = sample(backbone, noises + self.mean.view(-1, 1, 1), texts, **how)
        latents = invert(backbone, self.real, self.texts, "ddim", self.steps)
        made["ddim"] = sample(backbone, latents, self.texts, **how)
        texts, steps = self.texts[self.few], 10 if self.quick else 20
        for name, method in WAYS.items():
            made[name] = back(backbone, self.compressed, texts, method, steps)["images"]
        bank = fill_bank(folder / "bank", backbone, self.source, stored=())
        for count in (2, 8):
            # random weights: the plain means of all images of a class would be the same image
            planner = Planner(bank.members, Mixing(seed=0, alpha=1.0, members=count))
            plans = [planner(0, index) for index in range(self.samples // 2)]
            made[f"of {count}"] = Synthesizer(backbone, bank, Rule.parse("fade/chm")).images(plans)
        return made

    def row(self, made: dict[str, Tensor]) -> dict[str, Any]:
        """Return a row of the table, with the values of the claims."""
        real, classes = self.real, len(self.source.classes)
        seen = self.judge.network(made["samples"])
        few = real[self.few]
        found = {"ddim": reconstruction(real, made["ddim"])}
        found |= {name: reconstruction(few, made[name]) for name in WAYS}
        bound = reconstruction(few, self.compressed)["psnr"]
        cells: dict[str, Any] = {
            f"ISTD, {name}": torch.tensor([istd(walk[None]) for walk in made[name]])
            for name in ("slerp", "lerp") if name in made
        }  # fmt: skip
        ends = (made["slerp"][:, -1] - made["slerp"][:, 0]).double()
        cells["ISTD / end to end"] = cells["ISTD, slerp"] / ends.flatten(1).norm(dim=1)
        cells["FID"] = frechet_distance(seen, self.judge.real)
        cells["FID ±"] = 1.96 * deviation(frechet_distance, seen, self.judge.real, draws=30)
        cells["MSE, DDIM"] = found["ddim"]["mse"].mean().item()
        cells["PSNR, DDIM"] = found["ddim"]["psnr"]
        cells["SSIM, DDIM"] = found["ddim"]["ssim"].mean().item()
        cells["PSNR, guided DDIM"] = found["guided DDIM"]["psnr"]
        cells["PSNR, null-text"] = found["guided null-text"]["psnr"]
        cells["short of JPEG, dB"] = bound - found["guided null-text"]["psnr"]
        for count in (2, 8):
            labels = torch.arange(len(made[f"of {count}"])) % classes
            kept = self.judge.assess(made[f"of {count}"], labels)["kept"]
            cells[f"class kept of {count}, %"] = 100 * kept
        return cells


def size_of(args: argparse.Namespace) -> str:
    """Name the size of the run, for files."""
    return sized(args, "toy", "quick", "full")


def trained(args: argparse.Namespace, name: str, source: Source, prompts: dict[str, str]) -> Path:
    """Train a run, or resume it; return its folder."""
    weight, rank = RUNS[name]
    steps, fast = sized(args, (1, 3.0), (150, 3.0), (2000, 1.0))
    rate = fast * (1e-3 if rank else 1e-4)
    tiny = args.backbone == "tiny"
    settings = SmoothSettings(
        images=source, out=str(args.out / f"{size_of(args)}-{weight:g}-{rank}"),
        prompts=prompts, weight=weight, rank=rank, steps=steps, batch_size=16 if tiny else 2,
        accumulate=1 if tiny else 8, lr=rate, drop=0.5 if tiny else 0.1,
    )  # fmt: skip
    return smooth_backbone(settings, load_backbone(args.backbone, dtype=torch.float32))


def draw(rows: list[dict[str, Any]], made: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Draw a walk of each backbone, and ISTD against FID."""
    figure = Figure(figsize=(8, 0.75 * len(made) + 3.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(0.75 * len(made), 3.4))
    stops = made["none"]["slerp"].shape[1]
    for line, (name, cell) in zip(upper.subplots(len(made), stops), made.items(), strict=True):
        for axes, image in zip(line, cell["slerp"][0], strict=True):
            show(axes, image)
        line[0].set_ylabel(name, fontsize=6, rotation=0, ha="right")
    axes = lower.subplots()
    for row in rows:
        x = row["ISTD, slerp"].mean().item()
        axes.errorbar(x, row["FID"], row["FID ±"], fmt="o", capsize=2, label=row["backbone"])
    axes.set(xlabel="ISTD (slerp)", ylabel="FID")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=70)


def decide(by: dict[str, dict[str, Any]]) -> dict[str, dict[str, Interval]]:
    """Return what decides the claims, at the paper's λ and rank, not chosen by results."""
    plain, best = by["none"], by["λ 1"]
    low, high = (gain(best[key], plain[key]) for key in ("PSNR, null-text", "PSNR, guided DDIM"))
    fid = best["FID"] - plain["FID"]
    half = (best["FID ±"] ** 2 + plain["FID ±"] ** 2) ** 0.5
    return {
        "sd-table1-istd": {"": mean(best["ISTD, slerp"] / plain["ISTD, slerp"])},
        "sd-table1-fid": {"": Interval(fid - half, fid, fid + half)},
        "sd-table2-bound": {"": mean(best["short of JPEG, dB"])},
        "sd-table2-smooth": {
            "": Interval(high.low - low.high, high.value - low.value, high.high - low.low)
        },
    }


def main() -> None:
    """Train, sample, measure, draw, judge."""
    parser = options("Smooth Diffusion: arXiv 2312.04410.", "smooth-diffusion")
    parser.add_argument("--train", type=Path, help="folder of images to train on")
    args = parser.parse_args()
    backbone = load_backbone(args.backbone)
    study = Study(args, backbone)
    source: Source = Folder(args.train) if args.train else study.source
    if not (args.train or args.toy):
        source = Items(Clothes())
    texts = class_prompts(source.classes, "a photo of a {name}")
    prompts = COARSE if args.backbone == "tiny" else texts
    rows, made = [], {}
    runs = ["λ 1"] if args.toy else RUNS
    for name in tqdm(["none", *runs], "backbones"):
        folder = args.out / f"{size_of(args)}-{name.replace(' ', '-')}"
        if name != "none":
            place = trained(args, name, source, prompts)
            whole = not RUNS[name][1]
            backbone = load_backbone(place) if whole else load_backbone(args.backbone, lora=place)
        file = folder / "images.safetensors"
        made[name] = once(file, lambda b=backbone, f=folder: study.images(b, f))
        rows.append({"backbone": name, **study.row(made[name])})
    draw(rows, made, args.out / "smooth_diffusion.png")
    found = decide({row["backbone"]: row for row in rows})
    for row in rows:
        row["FID"] = f"{row['FID']:.2f} ± {row.pop('FID ±'):.2f}"
        row |= {key: ci95(cell) for key, cell in row.items() if isinstance(cell, Tensor)}
    title = (
        f"walks, samples and reconstructions of {len(rows)} backbones; guided ones of images after "
        f"JPEG {study.jpeg}"
    )
    caption = "A walk under each backbone, and ISTD against FID"
    record(args, title, rows, found, smooth_diffusion=caption)


if __name__ == "__main__":
    main()
