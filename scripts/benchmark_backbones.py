"""Time diffusion backbones against diffusers' own pipelines: ``benchmark.py backbones --help``.

Time, memory and operations do not depend on what the weights are, so they are random. Both sides
read the same folder and run in turn in one process, from the same latents and prompts, on the same
levels. The model ``small``, and its sisters, show on a CPU that every part runs, and that both
sides compute the same map.
"""

import argparse
import copy
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from backbone_configs import MODELS, PIPELINES, VP, Model, build, network
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from augment import invert, load_backbone, sample
from augment.diffusion.hub import quiet

Run = Callable[[int], Tensor]
"""Does a job for so many images."""

GIB = 2**30
GUIDANCE = 7.5
ROUNDS = 5
"""Timed rounds at most."""


def operations(model: Model, resolution: int) -> dict[str, float]:
    """TFLOP of the network, the encoder and the decoder for one image, counted without computing.

    A multiplication and an addition are two operations. The network's parameters are counted too.
    """
    with torch.device("meta"):
        net, vae = network(model), diffusers.AutoencoderKL(**model.vae)
        millions = sum(weight.numel() for weight in net.parameters()) / 1e6
        if model.millions and abs(millions - model.millions) > 0.1:
            raise SystemExit(f"expected {model.millions} M parameters, got {millions:.1f} M")
        side = resolution // 2 ** (len(model.vae["block_out_channels"]) - 1)
        latent = torch.empty(1, model.vae["latent_channels"], side, side)
        told: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, 77, model.widths[0])}
        if model.kind == "sdxl":
            text, pooled = torch.empty(1, 77, sum(model.widths)), torch.empty(1, model.widths[1])
            told = {"encoder_hidden_states": text}
            told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(1, 6)}
        if model.kind == "sd3":
            told = {"encoder_hidden_states": torch.empty(1, 77 + 256, model.widths[2])}
            told["pooled_projections"] = torch.empty(1, sum(model.widths[:2]))
        calls = {
            "network": lambda: net(latent, timestep=torch.empty(1), **told),
            "encoder": lambda: vae.encode(torch.empty(1, 3, resolution, resolution)),
            "decoder": lambda: vae.decode(latent),
        }
        counts = {"millions": millions}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            counts[name] = counter.get_total_flops() / 1e12
    return counts


@dataclass
class Job:
    """One thing to time: what a side does, and how many operations that is an image."""

    name: str
    tflop: float
    runs: dict[str, Run] = field(default_factory=dict)
    timings: dict[str, "Timing"] = field(default_factory=dict)


@dataclass
class Bench:
    """A model on a device, with the inputs that both sides get."""

    model: Model
    folder: Path
    args: argparse.Namespace

    def __post_init__(self) -> None:
        args, model = self.args, self.model
        self.resolution = args.resolution or model.resolution
        half = model.half if args.device == "cuda" else "float32"
        self.device, self.dtype = args.device, getattr(torch, args.dtype or half)
        dice = torch.Generator().manual_seed(1)
        side = self.resolution // 2 ** (len(model.vae["block_out_channels"]) - 1)
        shape = (args.batch, model.vae["latent_channels"], side, side)
        self.latents = torch.randn(shape, generator=dice).to(self.device)
        pixels = torch.rand(args.batch, 3, 8, 8, generator=dice).to(self.device)
        self.images = torch.nn.functional.interpolate(pixels, self.resolution, mode="bilinear")
        self.prompts = [f"a photo of a {'cat' if n % 2 else 'tench'}" for n in range(args.batch)]

    def jobs(self, tflop: dict[str, float]) -> list[Job]:
        """What is timed, without anybody who does it."""
        (many, few), net = self.model.steps, tflop["network"]
        first = "Euler" if self.model.kind == "sd3" else "DDIM"
        guided = f"guidance {GUIDANCE}"
        return [
            Job(f"invert, {first} {many}", many * net + tflop["encoder"]),
            Job(f"sample, {first} {many}, {guided}", 2 * many * net + tflop["decoder"]),
            Job(f"sample, DPM++ {few}, {guided}", 2 * few * net + tflop["decoder"]),
        ]

    def ours(self, dtype: torch.dtype, compiled: bool = False) -> list[Run]:
        """Our side of the jobs, each a function of how many images."""
        many, few = self.model.steps
        backbone = load_backbone(
            self.folder,
            device=self.device,
            dtype=dtype,
            resolution=self.resolution,
            compile=compiled,
            **self.model.options,
        )
        held = {"batch_size": self.args.batch}

        def sampled(count: int, solver: str, steps: int) -> Tensor:
            told = self.latents[:count], self.prompts[:count], solver, steps, GUIDANCE
            return sample(backbone, *told, **held)

        return [
            lambda n: invert(backbone, self.images[:n], self.prompts[:n], "ddim", many, **held),
            lambda n: sampled(n, "ddim", many),
            lambda n: sampled(n, "dpm++", few),
        ]

    def theirs(self, compiled: bool = False) -> list[Run | None]:
        """The side of diffusers, as its documentation runs it; images stay tensors."""
        with quiet():
            pipe = PIPELINES[self.model.kind].from_pretrained(self.folder, dtype=self.dtype)
            pipe = pipe.to(self.device)
        pipe.set_progress_bar_config(disable=True)
        if compiled:  # its tutorial "Accelerate inference"
            part = "transformer" if self.model.kind == "sd3" else "unet"
            net = getattr(pipe, part).to(memory_format=torch.channels_last)
            setattr(pipe, part, torch.compile(net, mode="max-autotune", fullgraph=True))
        many, few = self.model.steps
        euler, dpm, inverse = schedulers(self.model.kind, pipe.scheduler)
        flow = self.model.kind == "sd3"
        sigmas = {"sigmas": [1 - k / many for k in range(many)]} if flow else {}

        def run(count: int, scheduler: Any, steps: int, **more: Any) -> Tensor:
            pipe.scheduler = copy.deepcopy(scheduler)
            told = {"latents": self.latents[:count].to(self.dtype), "guidance_scale": GUIDANCE}
            told |= {"height": self.resolution, "width": self.resolution, "output_type": "pt"}
            told |= {"num_inference_steps": steps, **more}
            return pipe(self.prompts[:count], **told).images

        def inverted(count: int) -> Tensor:
            clean = encoded(pipe.vae, self.images[:count], self.dtype)
            return run(
                count, inverse, many, latents=clean, guidance_scale=1.0, output_type="latent"
            )

        return [
            inverted if inverse else None,
            lambda n: run(n, euler, many, **sigmas),
            lambda n: run(n, dpm, few),
        ]


def schedulers(kind: str, scheduler: Any) -> tuple[Any, Any, Any]:
    """First order, DPM++ and DDIM inversion of diffusers, on our levels where it has them."""
    if kind == "sd3":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return scheduler, diffusers.DPMSolverMultistepScheduler(**flow), None
    return (
        scheduler,
        diffusers.DPMSolverMultistepScheduler(**VP),
        diffusers.DDIMInverseScheduler(**VP, clip_sample=False),
    )


def encoded(vae: Any, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Clean latents by diffusers' VAE, in float32 where its configuration asks for that."""
    precision = torch.float32 if vae.config.force_upcast else dtype
    torch.nn.Module.to(vae, precision)
    with torch.no_grad():
        clean = vae.encode((2 * images - 1).to(precision)).latent_dist.mode()
    torch.nn.Module.to(vae, dtype)
    clean = (clean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return clean.to(dtype)


def allocated(device: str) -> int:
    """Bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def synchronized(device: str) -> float:
    """The time when all that was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of square matrix products of random numbers, the best of five runs."""
    size, count = (8192, 20) if device == "cuda" else (1024, 4)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = synchronized(device)
        for _ in range(count):
            left @ right
        best = min(best, (synchronized(device) - start) / count)
    return 2 * size**3 / best / 1e12


def psnr(found: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the peak being the range of the reference."""
    reference = reference.double().cpu()
    error = (found[: len(reference)].double().cpu() - reference).square().mean()
    return (20 * (reference.max() - reference.min()).log10() - 10 * error.log10()).item()


@dataclass
class Timing:
    """What is known of a job on one side: GiB, PSNR, and seconds round by round."""

    memory: float
    fidelity: float
    seconds: list[float] = field(default_factory=list)


def peaked(bench: Bench, held: int, run: Run) -> tuple[Tensor, float]:
    """The first run of a side, which warms up, and its GiB: ``held`` bytes of weights and its own.

    The other side's weights are on the GPU too, and do not count.
    """
    before = allocated(bench.device)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = run(bench.args.batch)
    peak = torch.cuda.max_memory_allocated() if bench.device == "cuda" else 0
    return found, (held + peak - before) / GIB


def in_turn(bench: Bench, jobs: list[Job], until: float) -> None:
    """Time every job and side, round by round, as many as there is time for; at least one."""
    last = 0.0
    for number in range(ROUNDS):
        begun = time.perf_counter()
        if number and begun + last > until:
            break
        for job in jobs:
            for who, run in job.runs.items():
                start = synchronized(bench.device)
                run(bench.args.batch)
                job.timings[who].seconds.append(synchronized(bench.device) - start)
        last = time.perf_counter() - begun


def compare(name: str, args: argparse.Namespace, rate: float, folder: Path) -> None:
    """Build a model, time it, and print its table."""
    model, until = MODELS[name], time.perf_counter() + args.seconds
    bench = Bench(model, folder, args)
    tflop = operations(model, bench.resolution)
    print(
        f"\n{name}: {tflop['millions']:.1f} M parameters; TFLOP an image at {bench.resolution} px: "
        + ", ".join(f"{part} {tflop[part]:.4g}" for part in ("network", "encoder", "decoder"))
        + f"; {str(bench.dtype).removeprefix('torch.')}",
        flush=True,
    )
    build(model, folder, args.device, bench.dtype)
    jobs = bench.jobs(tflop)
    exact = [run(min(2, args.batch)) for run in bench.ours(torch.float32)]
    gc.collect()  # what was built, and the float32 network, leave the GPU
    sides: dict[str, Callable[[], list[Run | None]]] = {"ours": lambda: bench.ours(bench.dtype)}
    if args.compile:
        sides["ours, compiled"] = lambda: bench.ours(bench.dtype, compiled=True)
    sides["diffusers"] = bench.theirs
    if args.compile_diffusers:
        sides["diffusers, compiled"] = lambda: bench.theirs(compiled=True)
    for who, load in sides.items():
        before = allocated(bench.device)
        runs = load()
        held = allocated(bench.device) - before
        for job, run, reference in zip(jobs, runs, exact, strict=True):
            if run is not None:
                found, memory = peaked(bench, held, run)
                job.runs[who], job.timings[who] = run, Timing(memory, psnr(found, reference))
    in_turn(bench, jobs, until)
    show(bench, jobs, rate)


def show(bench: Bench, jobs: list[Job], rate: float) -> None:
    """Print the Markdown table of a model."""
    print(
        "\n| job | by | images/s, median | quartiles | rounds | TFLOP/s | of matmul | GiB | PSNR |"
        "\n" + "|---" * 9 + "|"
    )
    for job in jobs:
        for who, timing in job.timings.items():
            speeds = [bench.args.batch / seconds for seconds in timing.seconds]
            low, median, high = quartiles(speeds)
            done = median * job.tflop
            memory = f"{timing.memory:.1f}" if bench.device == "cuda" else "–"
            print(
                f"| {job.name} | {who} | {median:.3g} | {low:.3g}–{high:.3g} | {len(speeds)} "
                f"| {done:.3g} | {100 * done / rate:.0f} % | {memory} | {timing.fidelity:.1f} |",
                flush=True,
            )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return low, median, high


def parsed(argv: list[str]) -> argparse.Namespace:
    """The options, the defaults filled in."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="benchmark.py backbones", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["sd15" if cuda else "small"]
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="by default the model's own half; on a CPU float32",
    )
    parser.add_argument("--resolution", type=int, help="pixels; 512, or 64 of the small models")
    parser.add_argument("--batch", type=int, help="images a call; 16, or 2 on a CPU")
    parser.add_argument(
        "--seconds",
        type=float,
        default=240,
        help="after which a model begins no other round; building and warming up count, and one "
        "round is always run",
    )
    parser.add_argument("--compile", action="store_true", help="ours compiled too")
    parser.add_argument(
        "--compile-diffusers", action="store_true", help="diffusers compiled as its tutorial does"
    )
    args = parser.parse_args(argv)
    args.device, args.batch = "cuda" if cuda else "cpu", args.batch or (16 if cuda else 2)
    return args


def main(argv: list[str]) -> None:
    """Print the machine, then a table a model."""
    args = parsed(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    product = torch.float32 if args.device == "cpu" else torch.bfloat16
    rate = matmul_rate(args.device, product)
    print(
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}; "
        f"batch {args.batch}\n"
        f"{str(product).removeprefix('torch.')} matrix products: {rate:.4g} TFLOP/s\n"
        "PSNR (dB) is against ours in float32 on the first two images, of images or inverted "
        "latents, the peak being their range. The inversion of diffusers asks the network at the "
        "level it goes to, and its DPM++ for flow has levels of its own: two other maps."
    )
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            compare(name, args, rate, Path(folder))
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
