"""Time diffusion backbones against diffusers' own pipelines: ``benchmark.py backbones --help``.

Weights are random, at the configurations of the public models, so that nothing is downloaded: time,
memory and operations do not depend on what the weights are. Text encoders are small stand-ins of
the right width, off the hot path: ours keeps what they said, the pipeline asks once a batch. Both
sides read the same folder and run in turn in one process, from the same latents and prompts, on the
same levels.

The model ``small``, and its sisters, show on a CPU that every part runs, and that both sides
compute the same map.
"""

import argparse
import copy
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from augment import invert, load_backbone, sample
from augment.diffusion.checkpoint import quiet

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import checkpoints

Run = Callable[[int], Tensor]
"""Does a job for so many images."""

GIB = 2**30
GUIDANCE = 7.5
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*kinds: str) -> dict[str, tuple[str, ...]]:
    """A UNet's block types from those of its way down."""
    down, up = (tuple(kind.format(way) for kind in kinds) for way in ("Down", "Up"))
    return {"down_block_types": down, "up_block_types": up[::-1]}


SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    **blocks(CROSS, CROSS, CROSS, PLAIN),
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    **blocks(PLAIN, CROSS, CROSS),
}
SD35: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "scaling_factor": 0.13025, "force_upcast": True}
VAE_3 = {**VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
VAE_3 |= {"use_quant_conv": False, "use_post_quant_conv": False}
SMALL_VAE = {"block_out_channels": (32,) * 4, "layers_per_block": 1, "norm_num_groups": 8}
VP = {**checkpoints.SCHEDULE, "timestep_spacing": "trailing", "steps_offset": 1}


@dataclass(frozen=True)
class Model:
    """What a benchmark builds.

    Args:
        kind: its pipeline, a key of `PIPELINES`.
        network, vae: their configurations.
        widths: of the text encoders.
        millions: of parameters, which the network is to have; not checked if 0.
        resolution: in pixels.
        steps: of DDIM (or Euler), which also inverts, and of DPM++.
        half: the precision it is meant for on a GPU.
        options: of `load_backbone`, so that it tells the network as much as diffusers does.
    """

    kind: str
    network: dict[str, Any]
    vae: dict[str, Any]
    widths: tuple[int, ...]
    millions: float = 0.0
    resolution: int = 512
    steps: tuple[int, int] = (50, 20)
    half: str = "float16"
    options: dict[str, Any] = field(default_factory=dict)


FLOW = {"half": "bfloat16", "options": {"t5": True, "max_sequence_length": 256}}
SMALL = {"millions": 0.0, "resolution": 64, "steps": (4, 4)}
MODELS = {
    "sd15": Model("sd", SD15, VAE, (768,), 859.5),
    "sdxl": Model("sdxl", SDXL, VAE_XL, (768, 1280), 2567.5),
    "sd35-medium": Model("sd3", SD35, VAE_3, (768, 1280, 4096), 2243.2, **FLOW),
    "small": Model(
        "sd",
        SD15
        | {
            "block_out_channels": (32, 64, 64, 64),
            "cross_attention_dim": 32,
            "norm_num_groups": 8,  # 32 would leave two numbers to normalise where the UNet ends
        },
        VAE | SMALL_VAE,
        (32,),
        **SMALL,
    ),
    "small-xl": Model(
        "sdxl",
        SDXL
        | {
            "block_out_channels": (32, 64, 64),
            "norm_num_groups": 8,
            "transformer_layers_per_block": 1,
            "cross_attention_dim": 56,
            "attention_head_dim": (2, 4, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        },
        VAE_XL | SMALL_VAE,
        (32, 24),
        **SMALL,
    ),
    "small-3": Model(
        "sd3",
        SD35
        | {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "caption_projection_dim": 32,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32 + 24,
            "dual_attention_layers": (0,),
        },
        VAE_3 | SMALL_VAE,
        (32, 24, 64),
        **SMALL,
        **FLOW,
    ),
}
"""The models by name."""


def network(model: Model) -> Any:
    """The untrained network of a model."""
    kind = diffusers.SD3Transformer2DModel if model.kind == "sd3" else None
    return (kind or diffusers.UNet2DConditionModel)(**model.network)


def build(model: Model, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """Write a pipeline of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        net, vae = network(model), diffusers.AutoencoderKL(**model.vae)
    for part in (net, vae):
        torch.nn.Module.to(part, dtype)
    clip = [transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection]
    kinds = {"sd": clip[:1], "sdxl": clip, "sd3": clip[1:] * 2}[model.kind]
    parts: dict[str, Any] = {"vae": vae, "transformer" if model.kind == "sd3" else "unet": net}
    for number, (kind, width) in enumerate(zip(kinds, model.widths, strict=False)):
        tail = f"_{number + 1}" if number else ""
        parts["text_encoder" + tail] = kind(checkpoints.clip_config(width))
        parts["tokenizer" + tail] = checkpoints.clip_tokenizer()
    if model.kind == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    if model.kind == "sd3":
        small: dict[str, Any] = {
            "vocab_size": 30,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
        }
        config = transformers.T5Config(d_model=model.widths[2], **small)
        parts["text_encoder_3"] = transformers.T5EncoderModel(config)
        parts["tokenizer_3"] = checkpoints.t5_tokenizer()
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        parts["scheduler"] = diffusers.DDIMScheduler(**VP, clip_sample=False)
    with quiet():
        return checkpoints.save(PIPELINES[model.kind](**parts), folder, {})


PIPELINES: dict[str, Any] = {
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
}
"""diffusers' pipelines by kind."""


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
        self.weights: dict[str, int] = {}

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

    def loaded(self, name: str, load: Callable[[], Any]) -> Any:
        """What ``load`` gives, its bytes on the GPU noted."""
        before = allocated(self.device)
        made = load()
        self.weights[name] = allocated(self.device) - before
        return made

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
            lambda n: invert(backbone, self.images[:n], self.prompts[:n], steps=many, **held),
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


def peaked(bench: Bench, who: str, run: Run) -> tuple[Tensor, float]:
    """The first run of a side, which warms up, and its GiB: its weights and what the run took."""
    before = allocated(bench.device)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = run(bench.args.batch)
    peak = torch.cuda.max_memory_allocated() if bench.device == "cuda" else 0
    return found, (bench.weights[who] + peak - before) / GIB


def in_turn(bench: Bench, jobs: list[Job], until: float) -> dict[tuple[str, str], list[float]]:
    """Seconds of every job and side, round by round, as many as there is time for; at least one."""
    times: dict[tuple[str, str], list[float]] = {}
    last = 0.0
    for number in range(bench.args.repeats):
        begun = time.perf_counter()
        if number and begun + last > until:
            break
        for job in jobs:
            for who, run in job.runs.items():
                start = synchronized(bench.device)
                run(bench.args.batch)
                taken = synchronized(bench.device) - start
                times.setdefault((job.name, who), []).append(taken)
        last = time.perf_counter() - begun
    return times


def compare(name: str, args: argparse.Namespace, rate: float, folder: Path) -> None:
    """Build a model, time it, and print its table."""
    model, until = MODELS[name], time.perf_counter() + args.seconds
    resolution = args.resolution or model.resolution
    tflop, bench = operations(model, resolution), Bench(model, folder, args)
    print(
        f"\n{name}: {tflop['millions']:.1f} M parameters; TFLOP an image at {resolution} px: "
        + ", ".join(f"{part} {tflop[part]:.4g}" for part in ("network", "encoder", "decoder"))
        + f"; {str(bench.dtype).removeprefix('torch.')}",
        flush=True,
    )
    build(model, folder, args.device, bench.dtype)
    jobs = bench.jobs(tflop)
    exact = [run(min(2, args.batch)) for run in bench.ours(torch.float32)]
    gc.collect()  # what was built, and the float32 network, leave the GPU
    sides: dict[str, Callable[[], Sequence[Run | None]]]
    sides = {"ours": lambda: bench.ours(bench.dtype)}
    if args.compile:
        sides["ours, compiled"] = lambda: bench.ours(bench.dtype, compiled=True)
    sides["diffusers"] = bench.theirs
    if args.compile_diffusers:
        sides["diffusers, compiled"] = lambda: bench.theirs(compiled=True)
    notes = {}
    for who, load in sides.items():
        for job, run, reference in zip(jobs, bench.loaded(who, load), exact, strict=True):
            if run is not None:
                start = time.perf_counter()
                found, memory = peaked(bench, who, run)
                notes[job.name, who] = memory, psnr(found, reference), time.perf_counter() - start
                job.runs[who] = run
    times = in_turn(bench, jobs, until)
    show(bench, jobs, times, notes, rate)


def show(
    bench: Bench,
    jobs: list[Job],
    times: dict[tuple[str, str], list[float]],
    notes: dict[tuple[str, str], tuple[float, float, float]],
    rate: float,
) -> None:
    """Print the Markdown table of a model."""
    batch = bench.args.batch
    print(
        "\n| job | by | images/s, median | quartiles | rounds | TFLOP/s | of matmul | GiB | PSNR "
        "| first run, s |\n" + "|---" * 10 + "|"
    )
    for job in jobs:
        for who in job.runs:
            taken, (memory, fidelity, first) = times[job.name, who], notes[job.name, who]
            low, median, high = quartiles([batch / seconds for seconds in taken])
            done = median * job.tflop
            held = f"{memory:.1f}" if bench.device == "cuda" else "–"
            share = f"{100 * done / rate:.0f} %"
            print(
                f"| {job.name} | {who} | {median:.3g} | {low:.3g}–{high:.3g} | {len(taken)} "
                f"| {done:.3g} | {share} | {held} | {fidelity:.1f} | {first:.1f} |",
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
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="by default the model's own half; on a CPU float32",
    )
    parser.add_argument("--resolution", type=int, help="pixels; 512, or 64 of the small models")
    parser.add_argument("--batch", type=int, help="images a call; 16, or 2 on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds at most")
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
    args.batch = args.batch or (16 if args.device == "cuda" else 2)
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
