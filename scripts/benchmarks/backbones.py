"""Diffusion backbones against diffusers' own pipelines.

Weights are random, because time, memory and operations do not depend on them. Both sides read the
same folder and get the same latents and prompts, on the same levels. The models ``small``,
``small-xl`` and ``small-3`` show on a CPU that every part runs and that both sides compute the same
map.

PSNR (dB) is against ours in float32 on the first two images or inverted latents; the peak is their
range. The inversion of diffusers asks the network at the level it goes to, and its DPM++ for flow
has levels of its own: these are other maps. It has no inversion of flow models; there the other
side is a plain Euler loop over its network, whose first step differs a little from ours.
"""

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from augment.report.check.speed import matmul_rate, synchronize
from benchmarks.backbone_configs import MODELS, build, operations
from benchmarks.paired import Comparison
from benchmarks.pipelines import Bench, Run

GIB = 2**30


def arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the options of this suite."""
    cuda = torch.cuda.is_available()
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
    parser.add_argument("--compile", action="store_true", help="ours compiled too")
    parser.add_argument(
        "--compile-diffusers", action="store_true", help="diffusers compiled as its tutorial does"
    )


def allocated(device: str) -> int:
    """Return the bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def psnr(found: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB; the peak is the reference's range."""
    reference = reference.double().cpu()
    error = (found[: len(reference)].double().cpu() - reference).square().mean()
    return (20 * (reference.max() - reference.min()).log10() - 10 * error.log10()).item()


@dataclass
class Side:
    """One side of a job, and what its runs show.

    Args:
        run: does the job.
        bench: its inputs.
        held: bytes of its weights; those of the other side are on the GPU too, and do not count.
        exact: result of ours in float32 on the first images.
    """

    run: Run
    bench: Bench
    held: int
    exact: Tensor
    seconds: list[float] = field(default_factory=list)
    memory: float = 0.0
    fidelity: float = float("nan")

    def __call__(self) -> None:
        """Do the job once; the first time, which is a warm-up, measure fidelity and memory."""
        device, start = self.bench.device, time.perf_counter()
        if self.fidelity == self.fidelity:
            self.run(self.bench.batch)
            synchronize(device)
            self.seconds.append(time.perf_counter() - start)
            return
        before, cuda = allocated(device), device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self.fidelity = psnr(self.run(self.bench.batch), self.exact)
        if cuda:
            self.memory = (self.held + torch.cuda.max_memory_allocated() - before) / GIB


def quality(ours: Side, theirs: Side, tflop: float, rate: float) -> str:
    """Describe fidelity, speed in TFLOP/s, and memory."""
    done = tflop * ours.bench.batch / statistics.median(ours.seconds)
    text = f"PSNR to float32 {ours.fidelity:.1f} dB, theirs {theirs.fidelity:.1f}"
    text += f"; {done:.3g} TFLOP/s, {100 * done / rate:.0f} % of matrix products'"
    return text + (f"; {ours.memory:.1f} GiB, theirs {theirs.memory:.1f}" if ours.memory else "")


def loaded(bench: Bench, load: Callable[[], list[Run]], exact: list[Tensor]) -> list[Side]:
    """Load one side; return it for every job."""
    before = allocated(bench.device)
    runs = load()
    held = allocated(bench.device) - before
    return [Side(run, bench, held, one) for run, one in zip(runs, exact, strict=True)]


def of_model(
    name: str, args: argparse.Namespace, rate: float, folder: Path
) -> Iterator[Comparison]:
    """Compare each of our sides with each of theirs, in all jobs of a model."""
    bench = Bench(MODELS[name], folder, args)
    tflop = operations(bench.model, bench.resolution)
    build(bench.model, folder, args.device, bench.dtype)
    exact = [run(min(2, bench.batch)) for run in bench.ours(torch.float32)]
    gc.collect()  # what was built, and the float32 network, leave the GPU
    ours = {"": loaded(bench, lambda: bench.ours(bench.dtype), exact)}
    if args.compile:
        ours[", compiled"] = loaded(bench, lambda: bench.ours(bench.dtype, True), exact)
    theirs = {"diffusers": loaded(bench, bench.theirs, exact)}
    if args.compile_diffusers:
        theirs["diffusers, compiled"] = loaded(bench, lambda: bench.theirs(True), exact)
    about = f"{str(bench.dtype).removeprefix('torch.')}, {bench.resolution} px, batch {bench.batch}"
    for number, (job, each) in enumerate(bench.jobs(tflop).items()):
        for (how, one), (who, other) in itertools.product(ours.items(), theirs.items()):
            sides = one[number], other[number]
            yield Comparison(
                f"{name}{how}: {job}; {about}", *sides, who, partial(quality, *sides, each, rate),
                count=bench.batch,
            )  # fmt: skip


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare one model after another."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cuda = args.device.startswith("cuda")
    rate = matmul_rate(torch.device(args.device), torch.bfloat16 if cuda else torch.float32)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            yield from of_model(name, args, rate, Path(folder))
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
