"""The walk between two real images: both are inverted, and latents between theirs are sampled.

Fig. 3 of Guo et al., *Smooth Diffusion*, arXiv 2312.04410: null-text inversion with one series of
unconditional embeddings, fitted to both images at once; slerp, nine images between.

Its two baselines invert nothing, which is the inversion ``noise``. At level 0 the walk is between
clean latents, which are only decoded ("VAE interpolation"). Above, both are noised first and what
lies between is denoised (ANID: Wang & Golland, *Interpolating between images with diffusion
models*, arXiv 2307.12560).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from augment.centroid.walks import WALKS, walk
from augment.core.errors import ImageRejected, UserError, lookup
from augment.core.files import JsonObject, check_folder, read_file, replacing
from augment.core.rng import normal, rng
from augment.diffusion import load_backbone
from augment.diffusion.backbone import Backbone
from augment.diffusion.conditions import Given, Schedule, embed, mix, rows_of
from augment.diffusion.process import level_number
from augment.diffusion.solver import check_images, sample
from augment.inversion import Inverter, inverted, inverter
from augment.inversion.noise import Noise
from augment.inversion.null_text import NullText
from augment.measure.reconstruction import reconstruction
from augment.measure.smoothness import STOPS
from augment.sources.decoding import open_image
from augment.sources.images import fit, pixels_of, reduce, save_image, sheet
from augment.sources.source import choose_backbone
from augment.synthesis.synthesizer import DEFAULT_LEVEL

THUMBNAIL = 128  # pixels a side, in the sheet of a walk


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """Walk from one image to another through their latents, and write the images on the way.

    Args:
        image: file of the first image.
        to: file of the last image.
        out: folder for the images, 00.png and so on, and walk.png, which shows them between the two
            given ones; older files of these names are replaced.
        prompt: what the images show.
        to_prompt: what the last image shows, if it is something else; embeddings are mixed.
        path: way between the latents: slerp, lerp, normalised, nin, fade, raw_slerp, circle, nao,
            translation or slice.
        between: number of images between both ends.
        inversion: method, as for invert; null_text fits one series of embeddings to both images,
            and needs a prompt.
        steps: number of solver steps to the noisiest level.
        level: where the inversion stops, in (0, 1], as a share of the steps; with noise, how far
            clean latents are noised, in [0, 1]: by default 0.5, and at 0 they are only decoded.
        guidance: scale of classifier-free guidance; by default that of the inversion, or of the
            model's family where both images have a prompt.
        backbone: diffusion model, as for invert.
        backbone_options: options of the backbone, as YAML such as '{resolution: 384}'.
        device: device such as cuda or cpu; by default the GPU if there is one.
    """

    image: str
    to: str
    out: str = "walk"
    prompt: str = ""
    to_prompt: str | None = None
    path: str = "slerp"
    between: int = STOPS - 2
    inversion: str = "null_text"
    steps: int = 50
    level: float | None = None
    guidance: float | None = None
    backbone: str = "auto"
    backbone_options: JsonObject | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_folder(Path(self.out))
        lookup(WALKS, self.path, "walk")
        if self.between < 0:
            raise UserError(f"expected 0 or more images between the ends, got {self.between}")

    @property
    def run(self) -> Inverter:
        """The inversion."""
        own: JsonObject = {"shared": True} if self.inversion == "null_text" else {}
        if self.level is not None and self.inversion != "noise":
            own["level"] = self.level
        return inverter(self.inversion, steps=self.steps, **own)


def write_walk(settings: WalkSettings) -> tuple[int, Float[Tensor, " 2"]]:
    """Write a walk's images; return their number, and the PSNR of both ends in dB.

    Raises:
        UserError: see `between`; or a file is no image.
    """
    run, ends = settings.run, [open_end(Path(file)) for file in (settings.image, settings.to)]
    name, options = choose_backbone(settings.backbone, ends), settings.backbone_options or {}
    backbone = load_backbone(name, settings.device, **options)
    form = backbone.channels, backbone.resolution
    given = torch.stack([fit(pixels_of(image, form[0]), form[1]) for image in ends])
    last = settings.prompt if settings.to_prompt is None else settings.to_prompt
    level = DEFAULT_LEVEL if settings.level is None else settings.level
    made = between(
        backbone, given, (settings.prompt, last), run, settings.path, settings.between + 2,
        settings.guidance, level,
    ).cpu()  # fmt: skip
    out, count = Path(settings.out), len(made)
    for number, image in enumerate(made):
        save_image(image, out / f"{number:0{len(str(count))}}.png", sync=False)
    shown = list(reduce(torch.cat([given[:1], made, given[1:]]), THUMBNAIL))
    places = [f"{place:.2f}" for place in torch.linspace(0, 1, count).tolist()]
    zoom = max(THUMBNAIL // backbone.resolution, 1)
    with replacing(out / "walk.png", sync=False) as file:
        sheet({settings.path: shown}, ["from", *places, "to"], zoom).save(file, "PNG")
    return count, reconstruction(given, made[[0, -1]])["psnr"]


def open_end(path: Path) -> Image.Image:
    """Open an image file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return open_image(read_file(path, "an image"))
    except ImageRejected as error:
        raise UserError(f"expected an image at {path}, got {error}; pass another file") from None


def between(
    backbone: Backbone,
    images: Float[Tensor, "2 c h w"],
    prompts: Sequence[str] = ("", ""),
    inversion: Inverter | None = None,
    name: str = "slerp",
    count: int = STOPS,
    guidance: float | None = None,
    level: float = DEFAULT_LEVEL,
    seed: int = 0,
) -> Float[Tensor, "t channels r r"]:
    """Sample the images of a walk between two images.

    Args:
        backbone: the model.
        images: both, in [0, 1].
        prompts: of both; the embeddings of two different ones are mixed linearly along the way,
            where the backbone has embeddings of text, else each image takes the nearer end's.
        inversion: by default null-text in 50 steps with one series of embeddings for both images;
            several series are mixed linearly.
        name: a key of `augment.centroid.WALKS`.
        count: number T of images, both ends included.
        guidance: scale of classifier-free guidance; by default that of the inversion or, if it has
            none, of the backbone's family where both images have prompts.
        level: of the inversion ``noise``: the share of the solver's steps that both clean latents
            are noised for, in [0, 1].
        seed: of that noise.

    Returns:
        float32 images in [0, 1] on the backbone's device; the ends are reconstructions.

    Raises:
        UserError: see `augment.invert`, `augment.walk` and `augment.sample`.
    """
    run = NullText(50, shared=True) if inversion is None else inversion
    scale = run.guidance
    if scale == 1 and all(prompts):
        scale = backbone.usage.guidance
    scale = scale if guidance is None else guidance
    own = scale if run.guidance != 1 else 1.0
    found = inverted(run, backbone, images, prompts, own)
    ends, levels = found["latents"], backbone.process.levels(run.steps)
    start = levels[run.steps_made]
    if isinstance(run, Noise):
        start = levels[level_number(run.steps, level)] if level else 0.0
        alpha, sigma = backbone.process.alpha_sigma(start)
        noises = [normal(rng(seed, "noise", end), *ends.shape[1:]) for end in range(2)]
        ends = alpha * ends + sigma * torch.stack(noises).to(ends)
    place = torch.linspace(0, 1, count)
    shares = torch.stack([1 - place, place], 1)
    words = _words(backbone, prompts, shares)
    negative: Given = words if run.negative == "prompt" else None
    if "nulls" in found:
        nulls = found["nulls"].float()
        if len(nulls) > 1:
            nulls = torch.einsum("tk,k...->t...", shares, nulls[found["null_rows"]])
        negative = Schedule.by_step(levels[: run.steps_made + 1], nulls)
    ends = ends.cpu()  # in float64, which Apple's GPUs have not
    latents = walk(ends[0], ends[1], count, name)
    images = sample(
        backbone, latents, words, run.solver, run.steps, scale, negative=negative, level=start
    )
    return check_images(backbone, images)


def _words(backbone: Backbone, prompts: Sequence[str], shares: Float[Tensor, "t 2"]) -> Given:
    """Return what each image of a walk is sampled with."""
    first, last = prompts
    if first == last:
        return first
    rows = embed(backbone, rows_of([first, last], 2))(1.0)
    if "text" not in rows:
        return [first if share >= 0.5 else last for share in shares[:, 0].tolist()]
    return mix(rows, shares)
