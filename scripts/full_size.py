"""Run `invert`, `adapt` and `synthesize` on a model of full size, with random weights.

    OMP_NUM_THREADS=1 python scripts/full_size.py sd15 --resolution 256

Network, autoencoder and text encoders have the configurations of the public model, so that memory
and time are the real ones without a download; the images mean nothing. Tokenizers know letters
only; SD 3.5 is without T5, as by default. What decides the computation is the default, but for two
steps and, if asked for, the precision, the resolution and the rows of a prompt. `adapt` makes one
step, with a batch of one image. A command that takes more memory of its own than `--gib`, or more
time of a processor than `--minutes`, is stopped, or not begun if its weights alone are too large;
the row says so. Memory of its own is without the pages of files, on which weights stay where they
are not converted. Each run replaces its model's row of the table between the marks in
BENCHMARKS.md.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import psutil
import torch
import transformers
from benchmarks.backbone_configs import MODELS, PIPELINES, VAE, VAE_3, checkpoints, network
from benchmarks.record import ROOT, processor
from PIL import Image
from torch.overrides import TorchFunctionMode

from augment.diffusion.backbones.lightningdit import Transformer

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

QWEN3 = {
    **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
}
"""Qwen3-4B, the text encoder of Z-Image and FLUX.2 [klein] 4B."""

KLEIN = {
    **{"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24},
    **{"joint_attention_dim": 7680, "guidance_embeds": False},
}
VAE_FLUX = VAE_3 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
VA_VAE = VAE | {
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    **{"latent_channels": 32, "scaling_factor": 1.0},
    **{"latents_mean": [0.0] * 32, "latents_std": [1.0] * 32},
}
LIGHTNINGDIT = {"in_channels": 32, "hidden_size": 1152, "depth": 28, "num_heads": 16}
NAMES = ("sd15", "sdxl", "sd35-medium", "lightningdit", "flux2-klein", "z-image")
GIB = 2**30


class Cheap(TorchFunctionMode):
    """Where layers draw random weights, copy a block of them: drawing billions takes minutes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.block = torch.randn(2**20 + 7, generator=generator, dtype=torch.float32) / 50

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the two methods that all initialisations draw by."""
        if func not in (torch.Tensor.normal_, torch.Tensor.uniform_) or args[0].is_meta:
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            for part in args[0].view(-1).split(len(self.block)):
                part.copy_(self.block[: len(part)])
        return args[0]


def parts_of(name: str) -> tuple[str, dict[str, Callable[[], Any]]]:
    """Return a model's pipeline class, and what makes each of its parts."""
    flow: Any = diffusers.FlowMatchEulerDiscreteScheduler
    if name in ("flux2-klein", "z-image"):
        klein, config = name == "flux2-klein", transformers.Qwen3Config(**QWEN3)
        kind = transformers.Qwen3ForCausalLM if klein else transformers.Qwen3Model
        net = diffusers.Flux2Transformer2DModel if klein else diffusers.ZImageTransformer2DModel
        codec = partial(diffusers.AutoencoderKL, **VAE_FLUX)
        return "Flux2KleinPipeline" if klein else "ZImagePipeline", {
            "text_encoder": lambda: kind(config),
            "tokenizer": checkpoints.qwen_tokenizer,
            "transformer": partial(net, **(KLEIN if klein else {})),
            "vae": diffusers.AutoencoderKLFlux2 if klein else codec,
            "scheduler": partial(flow, shift=3.0 if klein else 6.0, use_dynamic_shifting=klein),
        }
    model = MODELS[name]
    sd3, clip = model.kind == "sd3", [transformers.CLIPTextModel]
    pooled = transformers.CLIPTextModelWithProjection
    kinds = {"sd": clip, "sdxl": [*clip, pooled], "sd3": [pooled, pooled]}[model.kind]
    parts: dict[str, Callable[[], Any]] = {"vae": partial(diffusers.AutoencoderKL, **model.vae)}
    parts["transformer" if sd3 else "unet"] = partial(network, model)
    for number, (kind, config) in enumerate(zip(kinds, (CLIP_L, CLIP_G), strict=False)):
        tail = f"_{number + 1}" if number else ""
        parts["text_encoder" + tail] = partial(kind, transformers.CLIPTextConfig(**config))
        parts["tokenizer" + tail] = checkpoints.clip_tokenizer
    pndm: Any = diffusers.PNDMScheduler
    steps = {"steps_offset": 1, "skip_prk_steps": True}
    parts["scheduler"] = (
        partial(flow, shift=3.0) if sd3 else partial(pndm, **checkpoints.SCHEDULE, **steps)
    )
    return PIPELINES[model.kind].__name__, parts


def build(name: str, folder: Path) -> Path:
    """Write a model with random weights in bfloat16, a part at a time."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with Cheap():
            if name == "lightningdit":
                vae = diffusers.AutoencoderKL(**VA_VAE)
                return checkpoints.lightningdit(folder, vae=vae, **LIGHTNINGDIT)
            kind, parts = parts_of(name)
            index: dict[str, Any] = {"_class_name": kind}
            for part, make in parts.items():
                made = make()
                made.save_pretrained(folder / part)
                index[part] = [type(made).__module__.split(".")[0], type(made).__name__]
    finally:
        torch.set_default_dtype(torch.float32)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def count(name: str) -> int:
    """Return the number of a model's weights, without making them."""
    if name == "lightningdit":
        config = {**checkpoints.LIGHTNINGDIT, **LIGHTNINGDIT}
        makers = [partial(Transformer, config), partial(diffusers.AutoencoderKL, **VA_VAE)]
    else:
        parts = parts_of(name)[1].items()
        makers = [make for part, make in parts if not part.startswith(("tokenizer", "scheduler"))]
    with torch.device("meta"):
        return sum(weight.numel() for make in makers for weight in make().parameters())


def photo(root: Path, size: int = 512) -> Path:
    """Write an image of noise."""
    (root / "goldfish").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "goldfish" / "0.png")
    return root


def measure(
    words: Iterable[object], weights: float, gib: float, minutes: float
) -> tuple[str, bool]:
    """Run a command of latent-augment; return peak memory and seconds, or why it was stopped.

    Args:
        words: what is typed.
        weights: bytes of the weights that it loads.
        gib: limit of the process's own memory.
        minutes: limit of its time on processors.

    Returns:
        The text, and whether the command ended.
    """
    name, *_ = words = list(map(str, words))
    if weights > gib * GIB:
        return f"does not fit: weights of {weights / GIB:.1f} GiB, limit {gib:g}", False
    began, peak, own, reason = time.monotonic(), 0, 0, ""
    line = [sys.executable, "-m", "augment.cli", *words]
    process = psutil.Popen(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while process.status() != psutil.STATUS_ZOMBIE:
        memory, times = process.memory_info(), process.cpu_times()
        peak, busy = max(peak, memory.rss), times.user + times.system
        own = max(own, memory.rss - getattr(memory, "shared", 0))
        if own > gib * GIB or psutil.virtual_memory().available < GIB:
            reason = f"does not fit: above {own / GIB:.1f} GiB after {busy:.0f} s of CPU"
        elif busy > 60 * minutes:
            reason = f"above {minutes:g} min of CPU, at {peak / GIB:.1f} GiB"
        if reason:
            process.kill()
            break
        time.sleep(0.05)
    seconds = time.monotonic() - began
    if process.wait() and not reason:
        raise SystemExit(f"{name} ended with exit code {process.returncode}")
    found = reason or (
        f"{peak / GIB:.1f} GiB, {own / GIB:.1f} its own; {busy:.0f} s of CPU in {seconds:.0f} s"
    )
    print(f"{name}: {found}", flush=True)
    return found, not reason


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
    parser.add_argument("--rows", type=int, default=None, help="of a prompt; the model's own")
    parser.add_argument("--gib", type=float, default=17.0, help="limit of a command's memory")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="limit of a command's time of CPU"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model, bank, images = root / "model", root / "bank", photo(root / "in")
        half, weights = getattr(torch, args.dtype), count(args.model)
        if weights * half.itemsize <= args.gib * GIB:
            build(args.model, model)
        given = {"resolution": args.resolution, "max_sequence_length": args.rows}
        given = {key: value for key, value in given.items() if value}
        options = ["--backbone-options", json.dumps(given)] if given else []
        options += ["--prompt", "{name}"] if args.model == "lightningdit" else []
        where, on = ("--dtype", args.dtype, "--device", args.device), ("--backbone", model)
        commands = {
            "invert": (images, "--bank", bank, *on, "--steps", 2, *where, *options),
            "adapt": (
                *(images, "--out", root / "adapted", *on, "--steps", 1, "--batch-size", 1),
                *("--device", args.device, "--precision", "bf16-mixed", *options),
            ),
            "synthesize": (bank, "--out", root / "shards", "--per-class", 1, *where),
        }
        cells: dict[str, tuple[str, bool]] = {}
        for name, words in commands.items():
            if name == "synthesize" and not cells["invert"][1]:
                cells[name] = "–", False
                continue
            kept = torch.bfloat16 if name == "adapt" else half
            cells[name] = measure([name, *words], weights * kept.itemsize, args.gib, args.minutes)
    about = f"{args.dtype}, {args.device}, {torch.get_num_threads()} threads, {processor()}"
    size = f"{args.resolution} pixels" if args.resolution else "its own pixels"
    size += f", prompts of {args.rows} rows" if args.rows else ""
    row = f"| {args.model}, {size} | {' | '.join(text for text, _ in cells.values())} | {about} |"
    print(row)
    write_row(row)


if __name__ == "__main__":
    main()
