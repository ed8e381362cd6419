"""Train tiny-cifar: a backbone of CIFAR-FS's 64 base classes, and no other.

    OMP_NUM_THREADS=1 nice -n 19 python scripts/train_tiny_cifar.py CIFAR100 --run RUN [--bf16]

``CIFAR100`` holds CIFAR-100's training images in class folders. Stop it at any time: the same
command resumes from the checkpoint in ``RUN``, which is written every ten minutes. The folder also
gets ``log.csv`` (loss against hours), ``ema.safetensors`` (the averaged weights in half precision,
for `load_backbone`) and one more such file for every two CPU hours. ``--report WEIGHTS``, of
``scripts/train_resnet12.py``, samples from all of these and judges the samples.

The model is a rectified flow on Haar latents. Its condition is one vector: nothing, the image's
superclass or its class. With ``--features`` it is also a projection of the mean feature of one to
five *other* images of the class, weighted at random, with or without the superclass. So a class
that has no name here can be described by the features of a few images. The features come from
``scripts/train_resnet12.py``, which saw base classes only.

Images a second of training in batches of 64, on one core of an Intel Xeon with AVX-512 and without
AMX, in float32, beside other work: 79 (this UNet, 5.1 M parameters, 0.39 GFLOP an image forward),
52 (channels 64-128-192, 7.8 M, 0.64), 102 (32-64-128 with two layers as ``tiny``, 4.1 M, 0.27), 46
(a DiT of 6 layers of 256 with patches of 2, 9.6 M, 0.61). Alone on the machine the second made 63
and the third 127. ``torch.compile`` changed nothing there. Where a core computes in bfloat16
(AVX-512 BF16, here of an AMD EPYC), ``--bf16``, which also compiles, makes 180 with this UNet in
batches of 32, and float32 115. There a rate of 6e-4 diverged after 20 000 steps. The loss in
``log.csv`` is that of the network in training, not of its average, and the rate falls in the last
tenth of a run only. So with ``--start`` from the embedded weights, whose loss was 0.296 to 0.299 at
the end of theirs, it rises again at first: to 0.309 within 9600 steps at a rate of 3e-4, while
1.5e-4 kept it at 0.296 for 1200 steps. Compare runs at their ends.
"""

import argparse
import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_tiny
from cifar_fs import SUPERCLASSES, classes_of, load_part
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from long_run import DenoiserRun, half_precision, options
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.utils import save_image
from train_resnet12 import HELD_OUT, load_network

from augment.core.errors import UserError
from augment.core.files import sha256, write_bytes
from augment.core.rng import normal, rng
from augment.diffusion import load_backbone
from augment.diffusion.backbones.resnet12 import normalised
from augment.diffusion.backbones.tiny import Tiny, haar
from augment.diffusion.solver import sample
from augment.measure.features import frechet_distance
from augment.networks import in_batches

FEATURES = 320
UNET = train_tiny.UNET | {
    "in_channels": 12,
    "out_channels": 12,
    "layers_per_block": 1,
    "block_out_channels": (48, 96, 160),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}
PROMPTS = ("", *SUPERCLASSES, *classes_of("base"))
KINDS = {"null": 0.12, "superclass": 0.13, "class": 0.35, "feature": 0.25, "both": 0.15}
"""Frequency of each kind of condition; without features, the last two are the class."""
KEEP_EVERY = 2.0  # CPU hours


class Network(nn.Module):
    """The UNet and the layers that make its condition."""

    def __init__(self) -> None:
        super().__init__()
        self.unet: Any = UNet2DModel(**UNET, num_class_embeds=len(PROMPTS))
        nn.Module.to(self.unet, memory_format=torch.channels_last)
        self.texts = self.unet.class_embedding
        self.unet.class_embedding = nn.Identity()
        for (
            part
        ) in self.unet.modules():  # the gradient of PyTorch's fused attention is slow in bf16
            if isinstance(part, Attention):
                part.set_processor(AttnProcessor())
        self.feature = nn.Linear(FEATURES, self.texts.weight.shape[1])
        nn.init.zeros_(self.feature.weight)
        nn.init.zeros_(self.feature.bias)

    def forward(self, z: Tensor, times: Tensor, prompts: Tensor, features: Tensor) -> Tensor:
        """Predict noise − clean; a row of zeros is no feature."""
        there = (features != 0).any(1, keepdim=True)
        vector = self.texts(prompts) + torch.where(there, self.feature(features), 0)
        return self.unet(z, times, vector, return_dict=False)[0]


class Data:
    """The base classes' latents, classes, superclasses and, perhaps, standardised features."""

    def __init__(self, root: Path, features: Path | None, device: str) -> None:
        images, self.labels = (x.to(device) for x in load_part(root, "base"))
        clean = haar(images - 0.5)
        self.scale = 1 / clean.std().item()
        self.clean = clean * self.scale
        self.per_class = len(images) // len(classes_of("base"))
        coarse = [PROMPTS.index(name) for name in classes_of("base").values()]
        self.coarse = torch.tensor(coarse, device=device)[self.labels]
        self.fine = 1 + len(SUPERCLASSES) + self.labels
        self.mean, self.deviation, self.features = torch.zeros(FEATURES), torch.ones(()), None
        if features:
            rows = load_file(features, device=device)["base"]
            self.mean, self.deviation = rows.mean(0), (rows - rows.mean(0)).std()
            self.features = (rows - self.mean) / self.deviation

    def describe(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mix the features of one to five other images of each row's class."""
        assert self.features is not None
        draw = partial(torch.rand, generator=generator, device=rows.device)
        steps = 1 + (draw(len(rows), 5) * (self.per_class - 1)).long()
        first = rows[:, None] - rows[:, None] % self.per_class
        others = first + (rows[:, None] - first + steps) % self.per_class
        weights = -draw(len(rows), 5).clamp(1e-6).log()
        weights *= torch.arange(5, device=rows.device) < 1 + (5 * draw(len(rows), 1)).long()
        weights /= weights.sum(1, keepdim=True)
        return torch.einsum("nk,nkf->nf", weights, self.features[others])


class Run(DenoiserRun):
    """A training of a rectified flow."""

    def __init__(self, args: argparse.Namespace, data: Data) -> None:
        torch.manual_seed(args.seed)
        self.data, self.device = data, data.clean.device
        super().__init__(args, Network().to(self.device))
        self.predict = torch.compile(self.network) if args.bf16 else self.network
        if args.start and not self.step:
            self.begin(load_file(args.start, device=str(self.device)))

    def begin(self, weights: dict[str, Tensor]) -> None:
        """Begin with the weights of an ``ema.safetensors``, as `write` made it."""
        own, data = {k: v.float() for k, v in weights.items()}, self.data
        state = {"texts.weight": own.pop("class_embedding.weight")}
        if "feature.weight" in own:  # the standardisation of features is in it
            weight, bias = own.pop("feature.weight"), own.pop("feature.bias")
            state["feature.bias"] = bias + weight @ data.mean
            state["feature.weight"] = weight * data.deviation
        state |= {f"unet.{key}": value for key, value in own.items()}
        wanted, given = (
            {k: v.shape for k, v in part.items() if not k.startswith("feature")}
            for part in (self.network.state_dict(), state)
        )
        if given != wanted:
            raise UserError(
                f"expected weights of this script, got {self.args.start} with other tensors; give "
                "the ema.safetensors of a run"
            )
        self.network.load_state_dict(state, strict=False)
        self.average.load_state_dict(self.network.state_dict())

    def rate(self) -> float:
        """Warm up over 500 steps, decay as 1/√step from 20 000 on, cool in the last tenth."""
        step, steps = self.step + 1, self.steps
        decay, cool = min(1.0, (2e4 / step) ** 0.5), min(1.0, (steps - step + 1) / (0.1 * steps))
        return self.args.lr * min(1.0, step / 500) * decay * cool

    def decay(self) -> float:
        """Average over a tenth of all steps so far.

        Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, arXiv
        2312.02696.
        """
        return (1 - 1 / (self.step + 1)) ** 7.94

    def loss(self) -> Tensor:
        """Draw the step's batch, a function of seed and step, and measure the flow's error."""
        count, data = self.batch, self.data
        generator = torch.Generator(self.device).manual_seed(self.args.seed * 1_000_003 + self.step)
        draw = partial(torch.rand, generator=generator, device=self.device)
        rows = (draw(count) * len(data.clean)).long()
        places = (torch.arange(count, device=self.device) + draw(count)) / count
        normal = torch.special.ndtri(places.clamp(1e-6, 1 - 1e-6))
        sigma = torch.where(draw(count) < 0.1, draw(count), (1.2 * normal - 0.3).sigmoid())
        clean = data.clean[rows]
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        flip = draw(count, 1, 1, 1) < 0.5
        clean = torch.where(flip, train_tiny.mirrored(clean), clean)
        edges = torch.tensor(list(KINDS.values()), device=self.device).cumsum(0)[:-1]
        kind = torch.bucketize(draw(count), edges)
        features = torch.zeros(count, FEATURES, device=self.device)
        if data.features is None:
            kind = kind.clamp(max=2)
        else:
            features = torch.where(kind.view(-1, 1) > 2, data.describe(rows, generator), features)
        prompts = torch.where((kind == 1) | (kind == 4), data.coarse[rows], 0)
        prompts = torch.where(kind == 2, data.fine[rows], prompts)
        level = sigma.view(-1, 1, 1, 1)
        latent, times = (1 - level) * clean + level * noise, 1000 * sigma  # as `Flow.timestep`
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            out = self.predict(latent, times, prompts, features)
        return (out.float() - (noise - clean)).square().mean()

    def write(self) -> None:
        """Write the averaged weights in half precision, and keep them every few hours."""
        average, data = self.average, self.data
        weights = average.unet.state_dict() | {"class_embedding.weight": average.texts.weight}
        if data.features is not None:  # takes raw features: the standardisation is in it
            weights["feature.weight"] = average.feature.weight / data.deviation
            weights["feature.bias"] = average.feature.bias - weights["feature.weight"] @ data.mean
        about = {"scale": data.scale, "white": 0.5, "prompts": PROMPTS, "process": ("flow", {})}
        settings = {key: getattr(self.args, key) for key in ("batch", "lr", "seed")}
        features = sha256(self.args.features.read_bytes()) if self.args.features else None
        unet = UNET | {"num_class_embeds": len(PROMPTS)}
        config = {"unet": unet, **about, **settings, "features": features, **self.clocks}
        file = save(half_precision(weights), {"config": json.dumps(config)})
        write_bytes(self.folder / "ema.safetensors", file)
        kept = self.folder / f"ema-{self.core_hours // KEEP_EVERY * KEEP_EVERY:03.0f}h.safetensors"
        if self.core_hours >= KEEP_EVERY and not kept.exists():
            write_bytes(kept, file)


def report(args: argparse.Namespace) -> None:
    """Judge samples from every kept file: write ``report.csv``, and a picture of each.

    A row has the loss near its step; the accuracy of samples of each base class by the judge; and
    their Fréchet distance, in the judge's features, to images that the judge did not learn from.
    The row *real* has both for as many other such images.
    """
    judge = load_network(args.report)
    trunk, count = judge[:-1], args.per_class

    def assess(images: Tensor) -> tuple[Tensor, float]:
        features = in_batches(lambda x: trunk(normalised(x)), images)
        answer = judge[-1](features.float()).argmax(1)
        truth = torch.arange(len(images)) // (len(images) // len(classes_of("base")))
        return features, (answer == truth).double().mean().item()

    images, _ = load_part(args.images, "base")
    kept = images.unflatten(0, (len(classes_of("base")), -1))[:, -HELD_OUT:]
    reference, _ = assess(kept[:, count:].flatten(0, 1))
    features, accuracy = assess(kept[:, :count].flatten(0, 1))
    distance = frechet_distance(features, reference)
    rows = [["real", "", "", "", "", f"{accuracy:.4f}", f"{distance:.2f}"]]
    with (args.run / "log.csv").open(newline="") as file:
        losses = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    names = [name for name in classes_of("base") for _ in range(count)]
    noise = normal(rng(args.seed, "noise"), len(names), 12, 16, 16)
    for path in sorted(args.run.glob("ema*.safetensors")):
        backbone = load_backbone(path)
        assert isinstance(backbone, Tiny)
        step = backbone.config["step"]
        near = [loss for at, loss in losses if step - 1000 < at <= step]
        about = [f"{backbone.config['core_hours']:.2f}", step * backbone.config["batch"]]
        for guidance in (1.0, 2.0):
            images = sample(backbone, noise, names, guidance=guidance)
            features, accuracy = assess(images)
            distance = frechet_distance(features, reference)
            loss = f"{sum(near) / len(near):.4f}" if near else ""
            rows.append([path.stem, *about, loss, guidance, f"{accuracy:.4f}", f"{distance:.2f}"])
            picture = args.run / f"{path.stem}-{guidance:g}.png"
            save_image(images, picture, nrow=2 * count, padding=1)
        with (args.run / "report.csv").open("w", newline="") as file:
            header = ["weights", "core_hours", "images", "loss", "guidance", "accuracy", "fid"]
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    print((args.run / "report.csv").read_text())


def main() -> None:
    """Read the arguments and train."""
    parser = options(__doc__, steps=150_000, batch=64, lr=3e-4)
    parser.add_argument("images", type=Path, help="CIFAR-100's training images in class folders")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny-cifar"))
    parser.add_argument("--features", type=Path, help="file that train_resnet12.py wrote")
    parser.add_argument("--start", type=Path, help="ema.safetensors to begin with; a new --run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="compiled, in bfloat16")
    parser.add_argument("--report", type=Path, help="do not train; judge by this ResNet-12")
    parser.add_argument("--per-class", type=int, default=10, help="samples of the report")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if args.report:
        report(args)
    else:
        Run(args, Data(args.images, args.features, args.device)).train()


if __name__ == "__main__":
    main()
