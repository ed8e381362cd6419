"""Where the commands spend their time beside network, solver and codec, and a step of training.

Each command runs in a process of its own, on images for ``tiny`` and for a small random Stable
Diffusion. The CPU time of its main thread is divided into imports, the model (networks, gradients,
solvers, codecs), and the rest by the innermost function of this package, with the foreign package
that it called; the five largest shares of the rest are printed. With ``--before DIR`` the commands
of another checkout run too. With ``--quick`` there is ``tiny`` alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from augment.core.rng import rng
from augment.sources import Folder
from augment.sources.fashion import write_fashion
from augment.training.data.draws import Draw
from augment.training.data.module import TrainingImages
from augment.training.data.transforms import Augmentation
from augment.training.models.networks import build_network
from benchmarks.backbone_configs import MODELS, build
from benchmarks.paired import Comparison, Keep
from benchmarks.record import ROOT, comparisons, digits

SAMPLED = Path(__file__).with_name("sampled.py")
COMMANDS = {
    "invert": "invert images --bank {0}/bank {1}",
    "synthesize": "synthesize {0}/bank --out {0}/made --per-class 8",
    "train fit": "train fit --data.train images --data.test test --data.synthetic {0}/made "
    "--data.channels 1 --data.resolution 32 --trainer.max_steps 100 --trainer.accelerator cpu "
    "--trainer.default_root_dir {0}/run",
    "evaluate": "evaluate {0}/made --real images --network fashion",
    "report": "report {0}/bank --shards {0}/made --out {0}/report.html",
}
"""What is typed, of a folder and the options of its model."""
OPTIONS = {"tiny": "", "sd": "--backbone model --prompt {name} --steps 8"}


def arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the option of this suite."""
    parser.add_argument("--before", type=Path, help="another checkout, whose commands run too")


def shares(name: str, words: str, folder: Path, checkout: Path, threads: int) -> dict[str, Any]:
    """Run a command of a checkout in a folder; return its record."""
    out = folder / "places.json"
    env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(SAMPLED), str(out), *words.split()]
    env |= {"TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-500:]}")
    found = json.loads(out.read_text())
    rest = {k: v for k, v in found["places"].items() if k not in ("imports", "model")}
    return {
        "name": name, "cpu": found["cpu"], "imports": found["places"].get("imports", 0.0),
        "model": found["places"].get("model", 0.0), "rest": sum(rest.values()),
        "largest": dict(sorted(rest.items(), key=lambda item: -item[1])[:5]),
    }  # fmt: skip


def suite(args: argparse.Namespace) -> Iterator[Any]:
    """Time the loading of a training's batch, and profile the commands."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_fashion(folder / "images", "shots", list(range(1 if args.quick else 8)))
        write_fashion(folder / "test", "test", list(range(1 if args.quick else 40)))
        yield from batches(folder / "images", args.quick)
        models = dict(OPTIONS)
        if args.quick:
            del models["sd"]
        else:
            build(MODELS["small"], folder / "model", "cpu", torch.float32)
        for model, options in models.items():
            for what, words in COMMANDS.items():
                checkouts = {"": ROOT} | ({" before": args.before} if args.before else {})
                for when, checkout in checkouts.items():
                    line = words.format(model + when.strip(), options)
                    yield shares(f"{model}: {what}{when}", line, folder, checkout, args.threads)


def batches(images: Path, quick: bool) -> Iterator[Any]:
    """Compare RandAugment with torchvision's, and a batch's loading with the network's step."""
    augment = Augmentation(crop=None, flip=False, randaugment=2)
    ours, single = augment.random(32), v2.RandAugment(2, 9)
    generator = torch.Generator().manual_seed(0)
    for count in (32, 64):
        pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        generators = partial(lambda n: [rng(0, "augment", 0, place) for place in range(n)], count)

        def theirs(pixels: torch.Tensor = pixels, generators: Any = generators) -> torch.Tensor:
            made = []
            with torch.random.fork_rng(devices=[]):
                for image, own in zip(pixels, generators(), strict=True):
                    own.integers(0, 1, 2)  # what shifting and mirroring draw
                    own.random()
                    torch.random.default_generator.manual_seed(int(own.integers(2**63)))
                    made.append(single(image))
            return v2.functional.to_dtype(torch.stack(made), torch.float32, scale=True)

        mine = Keep(lambda pixels=pixels, generators=generators: ours(pixels, generators()))
        other = Keep(theirs)
        yield Comparison(
            f"RandAugment of {count} images of 32 pixels", mine, other, "torchvision, each image",
            lambda mine=mine, other=other: (
                "the same bits" if torch.equal(mine.result, other.result) else "other bits"
            ),
            count=count,
        )  # fmt: skip
    size = 4 if quick else 32
    data = TrainingImages(
        Folder(images), None, Augmentation(randaugment=2), channels=3, resolution=32, seed=0,
        memory=2**29,
    )  # fmt: skip
    places = iter(range(10**9))

    def load() -> torch.Tensor:
        draws = [Draw(0, place := next(places), place % len(data)) for _ in range(size)]
        return torch.stack([image for image, *_ in data.__getitems__(draws)])

    network = build_network("resnet12", 3, 10, False, 32, {"width": 8})
    network = torch.nn.Module.to(network, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())
    batch = load().contiguous(memory_format=torch.channels_last)
    labels = torch.arange(size) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels).backward()
        optimizer.step()

    yield Comparison(
        f"loading a batch of {size}, shift, mirror and RandAugment", load, step,
        "a step of ResNet-12 of width 8 on it", lambda: "not to be compared", unit="batch",
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown lines of comparisons, and of the shares of the commands."""
    lines = comparisons([row for row in rows if "ours" in row])
    lines += ["", "CPU seconds of a command, and the largest shares of the rest.", ""]
    lines += ["| command | all | imports | model | rest | largest |", "|---" * 6 + "|"]
    for row in (row for row in rows if "largest" in row):
        cells = [digits(row[key]) for key in ("cpu", "imports", "model", "rest")]
        largest = "; ".join(f"{place} {digits(value)}" for place, value in row["largest"].items())
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {largest} |")
    return lines
