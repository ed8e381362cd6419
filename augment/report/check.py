r"""The check of an installation: does a model do here what it should, and how fast?

A model is loaded and used as the commands use it. What is found is a list of `Line`: *as expected*
or *not as expected* with the reason. Measured are

- the codec: PSNR of :math:`D(E(x))`, and the deviation s of clean latents, which is about 1;
- the network: the mean squared error of its clean estimate over that of the best estimate that
  knows nothing of images, :math:`s^2\sigma^2/(\alpha^2 s^2 + \sigma^2)`, at three levels. From 1
  on it does not denoise. Reading the same output as another prediction shows whether the
  scheduler file names a wrong one;
- each inversion: PSNR of images sampled back; norm, bias and correlation of latents;
- centroids by rule, for the eye;
- speed, beside the machine's matrix products and diffusers' own pipeline.

`LIMITS` are wide: a model that is merely unusual passes.
"""

import importlib.metadata
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.resources import files
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from augment import __version__
from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.core.errors import AugmentWarning, BiasWarning, UserError
from augment.core.files import JsonObject
from augment.core.rng import normal, rng
from augment.diffusion import find_device, load_backbone, parse_dtype
from augment.diffusion.backbone import Backbone, check_batch
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion
from augment.diffusion.checkpoints.hub import brief
from augment.diffusion.process import PREDICTIONS
from augment.diffusion.sampling import Sampling
from augment.diffusion.solver import check_steps, sample
from augment.inversion import INVERTERS, invert, inverter
from augment.measure.health import MIN_PSNR
from augment.measure.reconstruction import psnr, reconstruction
from augment.plan.plan import Plan
from augment.report import RULES
from augment.sources import Folder, as_source
from augment.sources.fashion import write_fashion
from augment.sources.images import reduce, sheet
from augment.sources.prompts import prompts_of
from augment.sources.source import Source
from augment.sources.subsets import Selection
from augment.synthesis.synthesizer import Synthesizer

T = TypeVar("T")
IMAGES = 8
"""Maximum number of images that are inverted."""

LEVELS = (0.25, 0.5, 0.75)
"""Noise levels that the network is asked at."""

GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What is expected of an inversion.

    Args:
        back: lowest PSNR of images sampled back, in dB; the codec's own less 3 dB if that is less.
        norm: lowest and highest mean of ‖z‖/√D; 1 of white noise.
        correlation: highest |correlation| of neighbouring pixels; 0 of white noise.
        bias: highest |channel mean|; 0 of white noise.
    """

    back: float = 17.0
    norm: tuple[float, float] = (0.6, 1.1)
    correlation: float = 0.5
    bias: float = 0.5


LIMITS = dict.fromkeys(INVERTERS, Limits()) | {
    "forward_start": Limits(back=MIN_PSNR, norm=(0.95, 1.05), correlation=0.1, bias=0.3),
    "fireflow": Limits(back=MIN_PSNR),
    "published_ddim": Limits(back=15.0),
    "negative_prompt": Limits(back=15.0),
    "null_text": Limits(back=15.0),
}
"""Expectations by inversion. `forward_start` leaves noise of the law; the others leave something of
the image in smooth regions (arXiv 2410.23530), which changes their length; published DDIM errs
most. What guidance must repair is held to less."""

PICTURES_AGREE = {torch.float32: 40.0, torch.float16: 20.0, torch.bfloat16: 15.0}
"""Lowest PSNR in dB of our pictures to those of diffusers, whose latents are of this precision."""


@dataclass(frozen=True)
class Line:
    """A thing that was found.

    Args:
        topic: what it is about, in a word.
        text: what was found.
        expected: whether it is as expected; None is no judgement.
        reason: why it is not as expected, and what to do.
        values: the numbers.
    """

    topic: str
    text: str
    expected: bool | None = None
    reason: str = ""
    values: JsonObject = field(default_factory=dict)

    def __str__(self) -> str:
        judged = {True: "as expected", False: "not as expected", None: ""}[self.expected]
        why = f"\n{'':17}{self.reason}" if self.reason else ""
        return f"{judged:15}  {self.topic}: {self.text}{why}"


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What to check, and where.

    Args:
        backbone: diffusion model; see augment.load_backbone.
        images: folder with images by class, or another source as for invert, of which the first 8
            of the first class are taken; by default three landscapes that come with the package.
        steps: solver steps; by default those of the model's family.
        batch_size: images at a time when speed is measured; by default 16 on a GPU, 4
            above 512 pixels, and 3 on a CPU.
        out: PNG file to write, a sheet of centroids by rule.
        device: device such as cuda or cpu; by default the GPU if there is one.
        dtype: precision of the network: float32, float16 or bfloat16; by default half on a GPU.
        backbone_options: options of the backbone, as YAML.
    """

    backbone: str = "tiny"
    images: Source | str | None = None
    steps: int | None = None
    batch_size: int | None = None
    out: str | None = None
    device: str | None = None
    dtype: str | None = None
    backbone_options: JsonObject | None = None


def run_check(settings: CheckSettings, tell: Callable[[Line], Any] = print) -> JsonObject:
    """Check a model; return the record.

    Args:
        settings: see `CheckSettings`.
        tell: called with each line when it is known.

    Raises:
        UserError: settings or images that cannot be used.
    """
    check_steps(settings.steps or 1)
    check_batch(settings.batch_size or 1)
    device, dtype = find_device(settings.device), parse_dtype(settings.dtype)
    given = None if settings.images is None else as_source(settings.images)
    lines: list[Line] = []

    def add(line: Line) -> None:
        lines.append(line)
        tell(line)

    def add_warnings() -> None:
        """Add what the model was warned of; a rule's bias is a matter of the images."""
        kinds = (w for w in caught if issubclass(w.category, AugmentWarning))
        for text in dict.fromkeys(str(w.message) for w in kinds if w.category is not BiasWarning):
            add(Line("warning", "of the commands that were run", False, text))
        caught.clear()

    started = time.monotonic()
    add(machine(device))
    with warnings.catch_warnings(record=True) as caught, TemporaryDirectory() as place:
        warnings.simplefilter("always")
        try:
            options = settings.backbone_options or {}
            backbone = load_backbone(settings.backbone, device, dtype, **options)
        except UserError as error:
            add(Line("model", settings.backbone, False, str(error)))
        else:
            add_warnings()
            source = pictures(given, backbone.channels, Path(place))
            check = Check(backbone, source, settings.steps, settings.batch_size)
            for line in check.lines(Path(place), settings.out):
                add(line)
            add_warnings()
    good = all(line.expected is not False for line in lines)
    seconds = time.monotonic() - started
    count = sum(line.expected is False for line in lines)
    verdict = "everything is as expected" if good else f"{count} not as expected"
    add(Line("verdict", f"{verdict}, {seconds:.0f} s", good))
    return {
        "as_expected": good,
        "backbone": settings.backbone,
        "seconds": round(seconds, 1),
        "lines": [_as_json(asdict(line)) for line in lines],
    }


def pictures(images: Source | None, channels: int, place: Path) -> Source:
    """Return the images to check with, of one class.

    Args:
        images: those of the user; by default three landscapes, or embedded clothes if grey.
        channels: of the backbone.
        place: folder to write the clothes to.
    """
    if images is None and channels == 1:
        images = Folder(write_fashion(place / "clothes", "shots", [0, 1, 2]))
    chosen = Selection(images or Folder(Path(str(files("augment.sources"))) / "pictures"))
    name, ids = next(iter(chosen.ids.items()))
    chosen.ids = {name: ids[:IMAGES]}
    return chosen


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub")


def machine(device: torch.device) -> Line:
    """Say what runs where."""
    versions = {"latent-augment": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    known = {"versions": versions, "device": str(device), "machine": where}
    return Line("machine", f"{device} ({where}); {text}", values=known)


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has finished its queue."""
    if torch.device(device).type in ("cuda", "mps"):
        torch.accelerator.synchronize()


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds of a job, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure TFLOP/s of square matrix products of random numbers, the best of five runs."""
    size, count = (1024, 4) if device.type == "cpu" else (8192, 20)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run() -> None:
        for _ in range(count):
            torch.matmul(left, right)

    return 2 * size**3 * count / min(timed(run, device)[0] for _ in range(5)) / 1e12


def tflop_of(run: Callable[[], Any]) -> float:
    """Count the TFLOP of a job, of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


@dataclass
class Check:
    """The check of a loaded model.

    Args:
        backbone: the model.
        source: images of one class.
        steps: solver steps; by default those of the family.
        batch_size: images of the timed runs.
    """

    backbone: Backbone
    source: Source
    steps: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        self.device = self.backbone.device
        self.dtype: torch.dtype = getattr(self.backbone, "dtype", torch.float32)
        self.steps = self.steps or self.backbone.usage.steps
        usual = 16 if self.backbone.resolution <= 512 else 4
        self.batch = self.batch_size or (3 if self.device.type == "cpu" else usual)
        (self.name, self.ids), *_ = self.source.ids.items()
        self.template = self.backbone.usage.template
        self.prompts = prompts_of([self.name], self.template, None) if self.template else {}
        self.prompt = self.prompts.get(self.name, "")
        self.codec_psnr = float("inf")

    def lines(self, place: Path, out: str | None) -> Iterator[Line]:
        """Yield what is found; put banks below ``place``, and write the sheet to ``out``."""
        banks: list[LatentBank] = []
        yield self.model()
        yield from self.guarded("codec", self.codec)
        yield from self.guarded("network", self.network)
        for name in INVERTERS:
            if name != "noise" and (self.prompt or inverter(name).negative == "empty"):
                yield from self.guarded(name, partial(self.inversion, name, place / name, banks))
        if banks:
            yield from self.guarded("centroids", partial(self.centroids, banks[0], out))
        yield from self.guarded("speed", self.speed)
        yield from self.guarded("diffusers", self.beside_diffusers)
        yield self.memory()

    def guarded(self, topic: str, find: Callable[[], Iterator[Line]]) -> Iterator[Line]:
        """Yield what is found; an error of any kind becomes a line, and the check goes on."""
        try:
            yield from find()
        except UserError as error:
            yield Line(topic, "not measured", False, str(error))
        except Exception as error:
            yield Line(topic, "not measured", False, f"{type(error).__name__}: {brief(error)}")

    def model(self) -> Line:
        """Say which model was loaded, and what it is used with."""
        b, usage = self.backbone, self.backbone.usage
        text = (
            f"{b.fingerprint['name']}, {_short(self.dtype)}, {b.resolution} pixels, latents of "
            f"{'×'.join(map(str, b.latent_shape))}, {b.process!r}; guidance {usage.guidance:g}, "
            f"{self.steps} steps, prompt {self.prompt!r}"
        )
        return Line("model", text, True, values={"fingerprint": b.fingerprint})

    @cached_property
    def pixels(self) -> Float[Tensor, "n c h w"]:
        """The images in the backbone's form."""
        form = self.backbone.channels, self.backbone.resolution
        return torch.stack([self.source.load(image_id, *form) for image_id in self.ids])

    @cached_property
    def clean(self) -> Float[Tensor, "n c h w"]:
        """Their clean latents."""
        with torch.no_grad():
            return self.backbone.encode(self.pixels.to(self.device)).float()

    def codec(self) -> Iterator[Line]:
        """Judge what the codec loses, and the scale of its latents."""
        with torch.no_grad():
            back = self.backbone.decode(self.clean).cpu()
        error = reconstruction(self.pixels, back)["mse"].mean().item()
        db, spread = psnr(error), self.clean.std().item()
        self.codec_psnr = db
        reason = f"expected at least {MIN_PSNR:g} dB; the autoencoder's weights are not whole"
        good = db >= MIN_PSNR
        text = f"images back at {db:.1f} dB (PSNR)"
        yield Line("codec", text, good, "" if good else reason, {"psnr": db})
        good = 0.5 <= spread <= 2
        reason = (
            "expected 0.5 to 2, so that noise levels mean what they say; look at scaling_factor "
            "and shift_factor in the config.json of the autoencoder (vae)"
        )
        text = f"clean latents have a deviation of {spread:.2f}"
        yield Line("scale", text, good, "" if good else reason, {"deviation": spread})

    def network(self) -> Iterator[Line]:
        """Judge how well the network denoises, with its prediction and with others."""
        process, clean = self.backbone.process, self.clean
        own, errors = process.prediction, {name: [] for name in PREDICTIONS}
        condition = self.backbone.condition([self.prompt] * len(clean))
        noise = normal(rng(0, "noise"), *clean.shape).to(clean)
        variance = clean.var().item()
        for level in LEVELS:
            alpha, sigma = process.alpha_sigma(level)
            noisy = alpha * clean + sigma * noise
            with torch.no_grad():
                output = self.backbone.network(noisy, process.timestep(level), condition)
            ignorant = variance * sigma**2 / (alpha**2 * variance + sigma**2)
            for name, read in PREDICTIONS.items():
                wrong = (read(noisy, output, alpha, sigma)[0] - clean).square().mean().item()
                errors[name].append(wrong / ignorant)
        whole = all(isfinite(error) for error in errors[own])
        ratios = {name: max(values) for name, values in errors.items()}
        best = min(ratios, key=lambda name: ratios[name])
        pairs = zip(LEVELS, errors[own], strict=True)
        text = "error of the clean estimate over that of one that knows nothing of images: "
        text += ", ".join(f"{error:.2f} at noise level {level:g}" for level, error in pairs)
        good, reason = whole and ratios[own] < 1, ""
        if not whole:
            reason = (
                f"expected finite numbers; the network overflows in {_short(self.dtype)}, so take "
                "dtype bfloat16 or float32"
            )
        elif not good and ratios[best] < 1:
            reason = (
                f"its output fits the prediction {best} ({ratios[best]:.2f}) and not {own}, which "
                "its scheduler file says; correct prediction_type in scheduler_config.json"
            )
        elif not good:
            reason = (
                "expected below 1; the network does not denoise: its weights are untrained or "
                "damaged, or prediction, noise levels or scale of latents are not its own"
            )
        yield Line("network", text, good, reason, {"levels": LEVELS, "errors": errors[own]})

    def bank(self, name: str, place: Path) -> LatentBank:
        """Invert the images; the inversion that optimises does less, and the first alone."""
        source, fewer = Selection(self.source), dict[str, Any]()
        if inverter(name).guidance != 1:
            source.ids, fewer["inner"] = {self.name: self.ids[:1]}, 3
        return fill_bank(
            place, self.backbone, source, self.prompts, name,
            batch_size=self.batch, max_rejects=0.0, steps=self.steps, **fewer,
        )  # fmt: skip

    def inversion(self, name: str, place: Path, banks: list[LatentBank]) -> Iterator[Line]:
        """Judge the latents of an inversion, and how well images come back; append its bank."""
        banks.append(self.bank(name, place))
        health, limits = banks[-1].health(self.name), LIMITS[name]
        s, back = health.statistics, health.psnr or 0.0
        least = min(limits.back, self.codec_psnr - 3)
        across = max(s.horizontal, s.vertical, key=abs)
        text = (
            f"images back at {back:.1f} dB, norm/√D {s.norm:.3f}, largest channel mean "
            f"{s.largest[0]:.2f}, neighbours' correlation {across:+.2f}"
        )
        faults = []
        if not back >= least:
            faults.append(f"at least {least:.1f} dB")
        if not limits.norm[0] <= s.norm <= limits.norm[1]:
            faults.append(f"a norm of {limits.norm[0]:g} to {limits.norm[1]:g}")
        if not s.largest[0] <= limits.bias:
            faults.append(f"a channel mean of at most {limits.bias:g}")
        if not abs(across) <= limits.correlation:
            faults.append(f"a correlation of at most {limits.correlation:g}")
        values = {"psnr": back, "norm": s.norm, "channel_means": s.channel_means}
        values |= {"horizontal": s.horizontal, "vertical": s.vertical}
        reason = f"expected {' and '.join(faults)}" if faults else ""
        yield Line(name, text, not faults, reason, values)

    def centroids(self, bank: LatentBank, out: str | None) -> Iterator[Line]:
        """Make the centroid of all images by each rule; write the sheet."""
        plan = Plan.equal(0, self.name, self.ids)
        sampling = Sampling(batch_size=self.batch)
        singles = [Plan.equal(0, self.name, [i], k) for k, i in enumerate(self.ids)]
        rows = {"real": self.pixels}
        rows["back"] = Synthesizer(self.backbone, bank, Rule(), sampling).images(singles).cpu()
        made = {}
        for rule in RULES:
            synthesizer = Synthesizer(self.backbone, bank, Rule.parse(rule), sampling)
            made[rule] = synthesizer.images([plan]).cpu()
        contrasts = {rule: image.std().item() for rule, image in made.items()}
        real, good = self.pixels.std().item(), contrasts["fade/chm"] > self.pixels.std().item() / 4
        text = f"contrast of the centroid of {len(self.ids)} images: "
        text += ", ".join(f"{rule} {value:.2f}" for rule, value in contrasts.items())
        text += f"; of the images {real:.2f}"
        reason = "" if good else "expected at least a quarter of the images' by fade/chm"
        if out:
            shown = {name: list(reduce(images, 256)) for name, images in (rows | made).items()}
            count = max(map(len, shown.values()))
            page = sheet(shown, [str(k + 1) for k in range(count)], zoom=1)
            try:
                page.save(out, "PNG")
            except OSError as error:
                raise UserError(
                    f"expected to write {out}, got {error.strerror or error}; name another file"
                ) from None
            text += f"; {out}"
        yield Line("centroids", text, good, reason, {"contrasts": contrasts, "real": real})

    def speed(self) -> Iterator[Line]:
        """Time inversion and sampling, beside matrix products."""
        b, steps, guidance = self.backbone, self.steps or 1, self.backbone.usage.guidance
        rows = torch.arange(self.batch) % len(self.pixels)
        images, condition = self.pixels[rows], b.condition([self.prompt])
        first, clean = self.noise[:1].to(self.device), self.clean[:1]
        evaluation = tflop_of(lambda: b.network(first, b.process.timestep(0.5), condition))
        work = {
            "invert": evaluation * inverter("forward_start", steps=steps).evaluations
            + tflop_of(lambda: b.encode(self.pixels[:1].to(self.device))),
            "sample": evaluation * steps * (2 if guidance != 1 and self.prompt else 1)
            + tflop_of(lambda: b.decode(clean)),
        }
        rate = matmul_rate(self.device, self.dtype)
        runs: dict[str, Callable[[int], Tensor]] = {
            "invert": lambda n: invert(b, images, self.words, steps=n, batch_size=self.batch),
            "sample": self.sampled,
        }
        for name, run in runs.items():
            run(2)  # warm-up
            seconds, _ = timed(partial(run, steps), self.device)
            done = work[name] * self.batch / seconds
            text = (
                f"{self.batch / seconds:.3g} images/s, batch {self.batch}, {steps} steps; "
                f"{done:.3g} TFLOP/s, {done / rate:.0%} of matrix products' {rate:.3g}"
            )
            yield Line(
                name, text, values={"images_per_s": self.batch / seconds, "share": done / rate}
            )

    @property
    def words(self) -> list[str]:
        """The prompts of a timed run."""
        return [self.prompt] * self.batch

    @cached_property
    def noise(self) -> Float[Tensor, "n c h w"]:
        """The noise that timed runs sample."""
        return normal(rng(0, "noise"), self.batch, *self.backbone.latent_shape)

    def sampled(self, steps: int) -> Float[Tensor, "n c h w"]:
        """Sample by first order, with the guidance of the family."""
        guidance = self.backbone.usage.guidance
        return sample(self.backbone, self.noise, self.words, "ddim", steps, guidance, self.batch)

    def beside_diffusers(self) -> Iterator[Line]:
        """Compare our pictures, and their seconds, with those of diffusers' pipeline."""
        if not isinstance(self.backbone, LatentDiffusion):
            return
        model, guidance, steps = self.backbone, self.backbone.usage.guidance, self.steps or 1

        def run(count: int) -> Tensor | None:
            return model.sample_by_diffusers(self.noise, self.words, count, guidance)

        if run(steps) is None:  # warm-up
            return
        theirs_s, theirs = timed(partial(run, steps), self.device)
        ours_s, ours = timed(partial(self.sampled, steps), self.device)
        assert theirs is not None
        db = psnr((theirs.cpu() - ours.cpu()).square().mean().item())
        least, ratio = PICTURES_AGREE[self.dtype], theirs_s / ours_s
        good, reason = db >= least and ratio > 0.8, ""
        text = (
            f"its pipeline takes {ratio:.2f} × our time; its pictures equal ours to {db:.1f} dB, "
            "by the same noise, steps and guidance"
        )
        if not db >= least:
            reason = f"expected at least {least:g} dB in {_short(self.dtype)}; compare in float32"
        elif not good:
            reason = "expected at least 0.8 × our time"
        yield Line("diffusers", text, good, reason, {"times": ratio, "psnr": db})

    def memory(self) -> Line:
        """Say how much memory was used at most."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / GIB
            total = torch.cuda.get_device_properties(self.device).total_memory / GIB
            text = f"{peak:.1f} GiB of tensors at most, of {total:.0f} GiB"
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
            text = f"{peak:.1f} GiB of the process at most"
        return Line("memory", text, values={"peak_gib": peak})


def _as_json(value: Any) -> Any:
    """Replace numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_as_json, value))
    return None if isinstance(value, float) and not isfinite(value) else value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
