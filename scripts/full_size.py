"""Run `invert` and `synthesize` end to end on a model of full size, with random weights.

Network, autoencoder and text encoder have the configurations of Stable Diffusion 1.5 (the tokenizer
knows letters only), so that memory and time are the real ones without a download; the images mean
nothing. Every option that decides what is computed is the default, but for the two steps and the
precision. Prints seconds and peak memory of each command, which docs/backbones.md quotes.

    python scripts/full_size.py sd15 --dtype bfloat16
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from benchmarks.backbone_configs import SD15, VAE, checkpoints
from PIL import Image

ROOT = Path(__file__).parents[1]
CLIP_L = {
    **{"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77},
    **{"hidden_act": "quick_gelu", "projection_dim": 768},
}
"""The text encoder of CLIP ViT-L/14."""


def build_sd15(folder: Path, dtype: torch.dtype) -> Path:
    """Write Stable Diffusion 1.5 with random weights."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE, sample_size=512),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        tokenizer=checkpoints.clip_tokenizer(),
        unet=UNet2DConditionModel(**SD15),
        scheduler=PNDMScheduler(**checkpoints.SCHEDULE, steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        torch.nn.Module.to(part, dtype)
    return checkpoints.save(pipe, folder, {})


MODELS = {"sd15": build_sd15}


def photos(root: Path, size: int = 512) -> Path:
    """Write an image of noise for each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("american_robin", "n01440764"):
        (root / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name / "0.png")
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
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def main() -> None:
    """Build the model, run both commands, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model = MODELS[args.model](root / "model", dtype)
        where = ("--dtype", args.dtype, "--device", args.device)
        bank, images = root / "bank", photos(root / "photos")
        rows = {
            "invert": measure(
                "invert", images, "--bank", bank, "--backbone", model, "--steps", args.steps, *where
            ),
            "synthesize": measure(
                "synthesize", bank, "--out", root / "shards", "--per-class", 1, *where
            ),
        }
        made = json.loads((root / "shards" / "synthesis.json").read_text())
    print(f"\n{args.model}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads")
    print(f"{args.steps} steps, guidance {made['guidance']:g}, {made['usage']['template']!r}\n")
    print("| command, 2 images | seconds | peak memory |\n|---|---|---|")
    for name, (seconds, memory) in rows.items():
        print(f"| `{name}` | {seconds:.0f} | {memory:.1f} GiB |")


if __name__ == "__main__":
    main()
