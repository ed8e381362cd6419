"""Run `invert`, `adapt` and `synthesize` on a model of full size, with random weights.

    OMP_NUM_THREADS=1 python scripts/full_size.py sd15 --resolution 256

Network, autoencoder and text encoders have the configurations of the public model, so that memory
and time are the real ones without a download; the images mean nothing. Tokenizers know letters
only; SD 3.5 is without T5, as by default. What decides the computation is the default, but for two
steps and, if asked for, the precision and the resolution. `adapt` makes one step, with a batch of
one image. Each run replaces its model's row of the table between the marks in BENCHMARKS.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.backbone_configs import MODELS, PIPELINES, checkpoints, network
from benchmarks.record import ROOT, processor
from PIL import Image

MARKS = "<!-- full size -->", "<!-- end of full size -->"
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = CLIP | {
    **{"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
}
CLIP_G = CLIP | {
    **{"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280},
    **{"num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
}
"""The text encoders of CLIP ViT-L/14 and OpenCLIP ViT-bigG/14."""

NAMES = ("sd15", "sdxl", "sd35-medium")


def parts_of(name: str) -> dict[str, Any]:
    """Build the parts of a model's pipeline, in the default precision."""
    import diffusers
    import transformers

    model = MODELS[name]
    flow, clip = model.kind == "sd3", [transformers.CLIPTextModel]
    pooled = transformers.CLIPTextModelWithProjection
    kinds = {"sd": clip, "sdxl": [*clip, pooled], "sd3": [pooled, pooled]}[model.kind]
    parts: dict[str, Any] = {"vae": diffusers.AutoencoderKL(**model.vae)}
    parts["transformer" if flow else "unet"] = network(model)
    for number, (kind, config) in enumerate(zip(kinds, (CLIP_L, CLIP_G), strict=False)):
        tail = f"_{number + 1}" if number else ""
        parts["text_encoder" + tail] = kind(transformers.CLIPTextConfig(**config))
        parts["tokenizer" + tail] = checkpoints.clip_tokenizer()
    parts["scheduler"] = (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if flow
        else diffusers.PNDMScheduler(**checkpoints.SCHEDULE, steps_offset=1, skip_prk_steps=True)
    )
    if flow:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    if model.kind == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    return parts


def build(name: str, folder: Path) -> Path:
    """Write a model with random weights in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        parts = parts_of(name)
    finally:
        torch.set_default_dtype(torch.float32)
    return checkpoints.save(PIPELINES[MODELS[name].kind](**parts), folder, {})


def photo(root: Path, size: int = 512) -> Path:
    """Write an image of noise."""
    (root / "american_robin").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "american_robin" / "0.png")
    return root


def measure(*words: object) -> tuple[float, float]:
    """Run a command of latent-augment; return its seconds and its peak memory in GiB."""
    began = time.monotonic()
    line = [sys.executable, "-m", "augment.cli", *map(str, words)]
    process = subprocess.Popen(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words[0]} ended with exit code {process.returncode}")
    seconds = time.monotonic() - began
    print(f"{words[0]}: {seconds:.0f} s, {usage.ru_maxrss / 2**20:.1f} GiB", flush=True)
    return seconds, usage.ru_maxrss / 2**20


def write_row(row: str, path: Path = ROOT / "BENCHMARKS.md") -> None:
    """Put a row into the table between the marks, in place of the one of the same model."""
    text, (first, last) = path.read_text("utf-8"), MARKS
    before, rest = text.split(first)
    table, after = rest.split(last)
    key = re.match(r"\| [^|]+\|", row)
    rows = [line for line in table.strip().splitlines() if key and not line.startswith(key[0])]
    path.write_text(f"{before}{first}\n{chr(10).join([*rows, row])}\n{last}{after}", "utf-8")


def main() -> None:
    """Build the model, run the commands, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resolution", type=int, default=None, help="pixels; the model's own")
    parser.add_argument("--without-adapt", action="store_true", help="it loads 4 bytes a weight")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model, bank, images = (
            build(args.model, root / "model"),
            root / "bank",
            photo(root / "photo"),
        )
        options = ["--backbone-options", json.dumps({"resolution": args.resolution})]
        options = options if args.resolution else []
        where, on = ("--dtype", args.dtype, "--device", args.device), ("--backbone", model)
        cells = [
            measure("invert", images, "--bank", bank, *on, "--steps", 2, *where, *options),
            None if args.without_adapt else
            measure(
                "adapt", images, "--out", root / "adapted", *on, "--steps", 1, "--batch-size", 1,
                "--device", args.device, *options,
            ),
            measure("synthesize", bank, "--out", root / "shards", "--per-class", 1, *where),
        ]  # fmt: skip
        made = json.loads((root / "shards" / "synthesis.json").read_text())
    pixels = args.resolution or "its own"
    about = f"{args.dtype}, {args.device}, {torch.get_num_threads()} threads, {processor()}"
    texts = ["–" if cell is None else f"{cell[1]:.1f} GiB, {cell[0]:.0f} s" for cell in cells]
    row = (
        f"| {args.model}, {pixels} pixels | {' | '.join(texts)} | {made['guidance']:g} | {about} |"
    )
    print(row)
    write_row(row)


if __name__ == "__main__":
    main()
