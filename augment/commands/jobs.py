"""Banks and shards made: ``invert``, ``synthesize``."""

import shlex
from pathlib import Path
from statistics import fmean
from typing import Any

from augment.commands.common import (
    Record,
    recipe_of,
    tell_of_bank,
    work,
)
from augment.core.errors import UserError
from augment.sources import Source
from augment.synthesis.refine import SeedSelect, check_sampling


def invert(
    images: Source | str,
    bank: str,
    backbone: str = "tiny",
    prompt: str = "",
    prompts: dict[str, str] | None = None,
    inversion: str = "forward_start",
    steps: int = 25,
    guidance: float | None = None,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    inversion_options: dict[str, Any] | None = None,
    backbone_options: dict[str, Any] | None = None,
    errors: bool = True,
    clean: bool = False,
    max_rejects: float = 0.05,
    links: bool = False,
    nested: bool = False,
    background: str | None = None,
    executor: str = "local",
    dry_run: bool = False,
) -> Record:
    """Invert labelled images into a bank of latents.

    Args:
        images: folder with one sub-folder of image files a class; or another source, such as
            FewShot with --images.source DIR --images.shots 5, or as YAML in a --config.
        bank: folder of the bank, made if needed; an interrupted job goes on, and images that were
            added since are appended.
        backbone: the diffusion model: tiny, sd15, sdxl and so on, a folder or .safetensors file of
            a checkpoint, or the id of one on the Hugging Face hub.
        prompt: a template such as 'a photo of a {name}'; WordNet ids of ImageNet get their names.
        prompts: a prompt for each class, as YAML such as '{Coat: top}'; goes before the template.
        inversion: forward_start, fireflow, midpoint, fixed_point, ddim, negative_prompt, null_text.
        steps: solver steps.
        guidance: scale of classifier-free guidance; by default none but 7.5 for null_text.
        batch_size: images a network call; halved if a GPU's memory is too small.
        device: such as cuda or cpu; by default the GPU if there is one.
        dtype: float32, float16 or bfloat16 of the network; by default what the backbone likes.
        inversion_options: others of the inversion, as YAML such as '{iterations: 3}'.
        backbone_options: of the backbone, as YAML such as '{resolution: 384, lora: FILE}'.
        errors: sample every latent back and keep how much is lost; false halves the time.
        clean: keep the clean latents too.
        max_rejects: share of images that may be left out because they cannot be read.
        links: follow links that lead out of the folder.
        nested: take the images in all sub-folders of a class folder too.
        background: the colour that is seen through transparent pixels, such as '#808080'; by
            default white.
        executor: local, this process or, under torchrun or in a Slurm array, its share; or ray.
        dry_run: do and keep one unit of the work, and tell how long all will take.
    """
    settings = dict(locals())
    from augment.bank.fill import InversionJob, InvertSettings

    job = InversionJob.of(InvertSettings(**settings))
    return work(job, executor, dry_run) or tell_of_bank(Path(bank))


def synthesize(
    bank: str,
    out: str,
    per_class: int = 100,
    fill_to: int | None = None,
    tail_only: int | None = None,
    rule: str = "fade/chm",
    alpha: float | str = 1.0,
    seed: int = 0,
    members: int | None = None,
    noise: float = 0.0,
    solver: str = "exact",
    steps: int | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    prompt: str = "",
    batch_size: int = 64,
    backbone: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    backbone_options: dict[str, Any] | None = None,
    nearest: str | None = None,
    refine: SeedSelect | int | None = None,
    filters: dict[str, dict[str, Any] | None] | str | None = None,
    candidates: int = 1,
    images: Source | str | None = None,
    extension: str = "jpg",
    quality: int = 95,
    pixels: int = 256,
    shard_size: int = 1000,
    executor: str = "local",
    dry_run: bool = False,
) -> Record:
    """Synthesize images from random centroids of a bank's latents, as webdataset shards.

    Args:
        bank: folder of the bank.
        out: folder for the shards, out/shard-000000.tar and so on; an interrupted job goes on.
        per_class: images a class.
        fill_to: instead, as many as bring a class to so many, with the bank's real ones.
        tail_only: none for classes with so many real images or more.
        rule: norm rule and mean split, such as fade/chm or fix/0.
        alpha: concentration of the Dirichlet weights; 1 is uniform on the simplex, inf the centre.
            Or one for each member, such as 10,1,1.
        seed: of all dice.
        members: how many images a centroid mixes; by default all of the class.
        noise: share of fresh noise, in [0, 1).
        solver: exact (undoes the bank's inversion), fast (fireflow in 10 steps), or ddim, euler,
            dpm++, midpoint, fireflow.
        steps: solver steps; by default those of the bank, or 10 with fast.
        guidance: scale of classifier-free guidance; by default as the bank was inverted.
        interval: noise levels between which there is guidance, as YAML such as '[0.2, 0.8]'.
        prompt: a template such as 'a sketch of a {name}', if other than the bank's prompts.
        batch_size: images a network call; halved if a GPU's memory is too small.
        backbone: the diffusion model; by default the one that made the bank.
        device: such as cuda or cpu; by default the GPU if there is one.
        dtype: float32, float16 or bfloat16 of the network; by default what the backbone likes.
        backbone_options: of the backbone, as YAML such as '{compile: true}'.
        nearest: mix an image, drawn at random, with its neighbours, as many as members says: by
            the distance of latents (latent), or of the vectors by image id of a .safetensors file.
        refine: steps of SeedSelect, such as 5, that bring each centroid nearer to its class, in
            some four times a sampling's time each; or its settings, as --refine.steps 5
            --refine.network resnet50, or YAML. See --refine.help.
        filters: what images have to pass, such as degenerate,duplicate, out of classifier,
            prototype, clip, duplicate, degenerate; or YAML with their settings, such as
            '{degenerate: {}, duplicate: {minimum: 0.5}}'.
        candidates: how many plans are tried for an image before it is given up.
        images: the real images that refine and filters compare with, a folder or another source
            as for invert; by default where they were.
        extension: jpg, webp or png.
        quality: of jpg and webp.
        pixels: larger images are reduced to this.
        shard_size: images a shard.
        executor: local, this process or, under torchrun or in a Slurm array, its share; or ray.
        dry_run: do and keep one shard, and tell how long all will take.
    """
    import numpy as np

    from augment.bank.bank import LatentBank
    from augment.centroid import Rule
    from augment.core.registry import refuse_reserved
    from augment.diffusion import load_backbone, parse_dtype
    from augment.jobs.job import planning_device
    from augment.plan.planner import Planner, budget
    from augment.shards.write import Synthesis
    from augment.sources import place_of
    from augment.sources.prompts import class_prompts
    from augment.synthesis.filters import make_filter
    from augment.synthesis.synthesizer import Synthesizer, solver_of

    opened = LatentBank.open(bank)
    try:
        alphas = [float(number) for number in str(alpha).split(",")]
    except ValueError:
        raise UserError(
            f"expected a number, inf or numbers such as 10,1,1 for alpha, got {alpha!r}"
        ) from None
    concentration = alphas if len(alphas) > 1 else alphas[0]
    features = None if nearest is None else opened.features(nearest)
    real = np.array([len(ids) for ids in opened.members.values()])
    numbers = budget(real, per_class, fill_to, None, tail_only).tolist()
    if not any(numbers):
        raise UserError(
            f"expected a class that lacks images, got {min(real)} to {max(real)} real ones each; "
            "choose a larger --fill-to, --tail-only or --per-class"
        )
    plain = fill_to is None and tail_only is None
    some = {n: m for n, m in zip(opened.members, numbers, strict=True) if m}
    counts = per_class if plain else some
    planner = Planner(opened.members, seed, concentration, members, noise, features=features)
    Rule.parse(rule)  # what can be refused is refused before gigabytes are loaded
    _, count = solver_of(opened, solver, steps)
    if isinstance(refine, int):
        refine = SeedSelect(refine)
    if refine:
        check_sampling(count)
    if isinstance(filters, str):
        filters = dict.fromkeys(filters.split(","))
    judges = {name: make_filter(name, **(given or {})) for name, given in (filters or {}).items()}
    options = backbone_options or {}
    refuse_reserved(options, "name_or_path", "device", "dtype")
    recipe = recipe_of(opened, backbone)
    where = {"device": device, "dtype": parse_dtype(dtype)}
    model = load_backbone(
        **{**where, "device": planning_device(device, executor)}, **{**recipe, **options}
    )
    texts = class_prompts(opened.classes, prompt) if prompt else None
    synthesizer = Synthesizer(
        model, opened, rule, solver, steps, guidance, batch_size, interval, texts, refine,
        place_of(images),
    )  # fmt: skip
    job = Synthesis(
        Path(out), synthesizer, planner, counts, shard_size, extension, quality, pixels,
        judges, candidates, where,
    )  # fmt: skip
    return work(job, executor, dry_run) or tell_of_shards(job)


def tell_of_shards(job: Any) -> Record:
    """What was made, what was refused, and how much is mixed."""
    tally = job.tally
    some = range(min(tally.wanted, 1000))
    plans = [job.planner(0, index, job.labels[index]) for index in some]
    count = fmean(plan.effective_count for plan in plans)
    mixed = fmean(len(plan.members) for plan in plans)
    print(
        f"{job.path}: {tally.written} of {tally.wanted} images of {len(job.planner.images)} "
        f"classes in {tally.shards} shards; each mixes {count:.1f} of {round(mixed, 1):g} members "
        "on average (effective count)"
    )
    print("".join(line + "\n" for line in tally.refused_lines()), end="")
    print(
        "next: latent-augment train fit --data.train IMAGES --data.synthetic "
        f"{shlex.quote(str(job.path))} --trainer.max_epochs 20"
    )
    return {
        "complete": True, "shards": str(job.path), "written": tally.written,
        "wanted": tally.wanted, "effective_count": count, "refused": tally.refused,
        "lacking": job.lacking,
    }  # fmt: skip
