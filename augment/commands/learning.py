"""What trains: ``train``, ``sweep``, ``episodes``, ``smooth``, ``demo``."""

import json
import shlex
from typing import Any, Literal

from augment.commands.common import Record
from augment.sources import Source


def train() -> None:
    """Train a classifier with Lightning: train fit --config YAML; see train --help."""


def sweep() -> None:
    """Train and test with several seeds and values of settings; see sweep --help."""


def episodes() -> None:
    """Evaluate N-way K-shot episodes with synthetic images; see episodes --help."""


def smooth(
    images: Source | str,
    out: str,
    backbone: str = "tiny",
    prompt: str = "",
    prompts: dict[str, str] | None = None,
    captions: str | None = None,
    weight: float = 1.0,
    rank: int = 8,
    targets: list[str] | None = None,
    steps: int = 30000,
    batch_size: int = 3,
    accumulate: int = 32,
    lr: float = 1e-4,
    drop: float = 0.1,
    seed: int = 0,
    device: str | None = None,
    devices: int = 1,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    workers: int = 0,
    backbone_options: dict[str, Any] | None = None,
) -> Record:
    """Train a backbone to be smooth (Smooth Diffusion): equal steps of noise, equal steps of image.

    Args:
        images: folder with one sub-folder of image files a class, a folder of shards, or
            another source, as for invert.
        out: folder of the run, which gets pytorch_lora_weights.safetensors, for
            --backbone-options '{lora: OUT}'; an interrupted run goes on.
        backbone: the diffusion model, as for invert.
        prompt: a template such as 'a photo of a {name}'.
        prompts: a prompt for each class, as YAML such as '{Coat: top}'; goes before the template.
        captions: a metadata.jsonl with file_name and text of images, which go before the prompts.
        weight: of the regulariser.
        rank: of the low-rank weights; 0 trains all weights, and leaves a whole backbone.
        targets: ends of the names of layers that get low-rank weights; by default the projections
            of the attention.
        steps: of the optimiser.
        batch_size: images a batch, on each device.
        accumulate: batches a step.
        lr: the rate, which is constant.
        drop: share of the images that are trained without their prompt.
        seed: of all dice.
        device: such as cuda or cpu; by default the GPU if there is one.
        devices: processes, each on a device of its own.
        precision: of the training; bf16-mixed computes in bfloat16 what can be.
        workers: processes that load images.
        backbone_options: of the backbone, as YAML such as '{resolution: 384}'.
    """
    import torch

    from augment.core.registry import refuse_reserved
    from augment.diffusion import load_backbone
    from augment.jobs.job import planning_device
    from augment.sources.prompts import prompts_of
    from training.smooth.data import open_source, read_captions
    from training.smooth.regulariser import PROJECTIONS
    from training.smooth.run import smooth_backbone

    source = open_source(images).readable(name="training")
    texts = prompts_of(source.classes, prompt, prompts)
    told = None if captions is None else read_captions(captions, source)
    options = backbone_options or {}
    refuse_reserved(options, "name_or_path", "device", "dtype")
    where = planning_device(device)
    model = load_backbone(backbone, where, torch.float32, **options)
    place = smooth_backbone(
        model, source, out, texts, told, weight, rank, targets or PROJECTIONS, steps, batch_size,
        accumulate, lr, drop, seed, devices, precision, workers,
    )  # fmt: skip
    option, value = "--backbone", str(place)
    if rank:
        option, value = "--backbone-options", json.dumps({"lora": value}, ensure_ascii=False)
    given = f"{option} {shlex.quote(value)}"
    print(f"{place}: written; load it with {given}")
    return {"written": str(place), "options": given}


def demo(out: str | None = None, full: bool = False, seeds: int | None = None) -> None:
    """Do the whole job on embedded images: 5 labelled images a class to a better classifier.

    Args:
        out: folder for everything the demo makes, by default runs/demo or, with --full,
            runs/demo-full; an interrupted demo goes on.
        full: every row of the table and more seeds, in its own time.
        seeds: number of seeds; 3, or 5 with --full.
    """
    from training.demo import run_demo

    run_demo(out, full, seeds)
