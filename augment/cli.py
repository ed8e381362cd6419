"""The command ``latent-augment``.

Every function here is a sub-command and its arguments are the options (jsonargparse); heavy
modules are imported when a command runs, so that ``--help`` is quick.
"""

import math
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from augment.errors import AugmentWarning, UserError, lookup
from augment.sources import Folder, Source


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
    executor: str = "local",
    dry_run: bool = False,
) -> None:
    """Invert labelled images into a bank of latents.

    Args:
        images: folder with one sub-folder of PNG or JPEG files a class; or another source, such as
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
        executor: local, this process or, under torchrun or in a Slurm array, its share; or ray.
        dry_run: do and keep one unit of the work, and tell how long all will take.
    """
    from augment.diffusion import load_backbone
    from augment.fill import Inversion
    from augment.inversion import inverter
    from augment.prompts import class_prompts

    if links and not isinstance(images, str):
        raise UserError(
            f"expected links with a folder of images, got {type(images).__name__}; leave it out, "
            "or give it to a Folder therein"
        )
    source = Folder(images, links) if isinstance(images, str) else images
    texts = {str(k): v for k, v in (prompts or {}).items()}
    if prompt:
        texts |= class_prompts([name for name in source.classes if name not in texts], prompt)
    settings, options = inversion_options or {}, backbone_options or {}
    refuse(settings, "steps", "guidance", "batch_size")
    refuse(options, "name_or_path", "device", "dtype")
    method = inverter(inversion, steps=steps, **settings)  # before gigabytes are loaded
    where = {"device": device, "dtype": parse_dtype(dtype)}
    model = load_backbone(
        backbone, **{**where, "device": planning_device(device, executor)}, **options
    )
    kept = [name for name, keep in (("errors", errors), ("clean", clean)) if keep]
    job = Inversion(
        Path(bank), source, model, method, guidance, texts, batch_size, tuple(kept), max_rejects,
        where,
    )  # fmt: skip
    if work(job, executor, dry_run):
        tell_of_bank(Path(bank))


def planning_device(device: str | None, executor: str) -> str | None:
    """Where this process loads the backbone: a rank on its own GPU; on the CPU, if others work."""
    import os

    import torch

    if executor != "local":
        return "cpu"
    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def work(job: Any, executor: str, dry_run: bool) -> bool:
    """Do a job, or this process's share of it; whether all of it is done now."""
    from augment.jobs import estimate, run, stripe

    if dry_run:
        print(estimate(job))
        return False
    rank, world = stripe() if executor == "local" else (0, 1)
    complete = run(job, executor, (rank, world))
    if not complete and world == 1:
        raise UserError(
            f"expected all units of the job in {job.path}, got some that workers finished and that "
            "are not there; choose a folder that all machines share"
        )
    if not complete:
        print(f"{job.path}: the share of rank {rank} of {world} is done; others are not yet")
    return complete


def tell_of_bank(path: Path) -> None:
    """What is in a bank, and what the bias of its latents would do."""
    from augment.bank import LatentBank
    from augment.measure import latent_statistics, predicted_bias

    bank = LatentBank.open(path)
    count = sum(map(len, bank.members.values()))
    print(f"{path}: {count} latents of {len(bank.classes)} classes")
    rejects = sum(len(c.record["rejects"]) for chunks in bank.chunks.values() for c in chunks)
    if rejects:
        print(f"{rejects} images are left out: see {path / 'rejects.jsonl'}")
    worst = max(bank.classes, key=bank.largest_mean)
    found = latent_statistics(bank.latents(worst))
    print(f"\nclass {worst}, whose channel means are largest:\n{found}")
    if found.biased:
        grown = predicted_bias(found, found.count, math.inf)
        print(
            f"all {found.count} of them mixed in equal parts by a rule without a mean split "
            f"(fix/0) would have channel means up to {grown:.2f}; take one with /chm or /lp"
        )


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
    filters: dict[str, dict[str, Any] | None] | str | None = None,
    candidates: int = 1,
    images: str | None = None,
    extension: str = "jpg",
    quality: int = 95,
    pixels: int = 256,
    shard_size: int = 1000,
    executor: str = "local",
    dry_run: bool = False,
) -> None:
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
        filters: what images have to pass, such as degenerate,duplicate, out of classifier,
            prototype, clip, duplicate, degenerate; or YAML with their settings, such as
            '{degenerate: {}, duplicate: {minimum: 0.5}}'.
        candidates: how many plans are tried for an image before it is given up.
        images: folder of the real images that filters compare with; by default where they were.
        extension: jpg, webp or png.
        quality: of jpg and webp.
        pixels: larger images are reduced to this.
        shard_size: images a shard.
        executor: local, this process or, under torchrun or in a Slurm array, its share; or ray.
        dry_run: do and keep one shard, and tell how long all will take.
    """
    import numpy as np

    from augment.bank import LatentBank
    from augment.centroid import Rule
    from augment.diffusion import load_backbone
    from augment.filters import make_filter
    from augment.generate import Synthesis
    from augment.plan import Planner, budget
    from augment.prompts import class_prompts
    from augment.synthesis import Synthesizer, solver_of

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
    plain = fill_to is None and tail_only is None
    some = {n: m for n, m in zip(opened.members, numbers, strict=True) if m}
    counts = per_class if plain else some
    planner = Planner(opened.members, seed, concentration, members, noise, features=features)
    Rule.parse(rule)  # what can be refused is refused before gigabytes are loaded
    solver_of(opened, solver, steps)
    if isinstance(filters, str):
        filters = dict.fromkeys(filters.split(","))
    judges = {name: make_filter(name, **(given or {})) for name, given in (filters or {}).items()}
    options = backbone_options or {}
    refuse(options, "name_or_path", "device", "dtype")
    recipe = {**opened.recipe, **({"name_or_path": backbone} if backbone else {})}
    if Path(recipe["name_or_path"]).is_absolute() and not Path(recipe["name_or_path"]).exists():
        raise UserError(
            f"expected the backbone that made the bank at {recipe['name_or_path']}, got nothing "
            "there; say where it is with --backbone"
        )
    where = {"device": device, "dtype": parse_dtype(dtype)}
    model = load_backbone(
        **{**where, "device": planning_device(device, executor)}, **{**recipe, **options}
    )
    texts = class_prompts(opened.classes, prompt) if prompt else None
    synthesizer = Synthesizer(
        model, opened, rule, solver, steps, guidance, batch_size, interval, texts
    )
    job = Synthesis(
        Path(out), synthesizer, planner, counts, shard_size, extension, quality, pixels,
        judges, candidates, None if images is None else Path(images), where,
    )  # fmt: skip
    if work(job, executor, dry_run):
        tell_of_shards(job)


def tell_of_shards(job: Any) -> None:
    """What was made, what was refused, and how much is mixed."""
    from augment.upkeep import count_shards

    tally = count_shards(job.path)
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
    if tally.written < tally.wanted:
        print(f"{tally.wanted - tally.written} images were given up; allow more --candidates")


def inspect(path: str) -> None:
    """Tell what a bank or a folder of shards holds.

    Args:
        path: the folder.
    """
    from augment import upkeep

    print(upkeep.inspect(path))


def verify(path: str, images: str | None = None, discard: bool = False) -> None:
    """Compare every file of a bank or of shards with what was recorded when it was written.

    Args:
        path: the folder.
        images: of a bank, the folder of images, to be compared too.
        discard: take out what is damaged; the command that made it then makes it again.
    """
    from augment import upkeep
    from augment.files import locked

    findings = upkeep.verify(path, images)
    for finding in findings:
        print(finding.what)
    if discard:
        with locked(Path(path)):  # not while a job is at work there
            upkeep.discard(findings)
    if findings:
        damaged = sum(finding.record is not None for finding in findings)
        after = "taken out; run the command that made it again" if discard else "as above"
        raise UserError(
            f"expected {path} as it was written, got {len(findings)} findings, {damaged} of them "
            f"damage that can be made again, {after}"
            + ("" if discard or not damaged else "; take it out with --discard")
        )
    print(f"{path}: every file is as it was written")


def evaluate(
    path: str,
    real: Source | str | None = None,
    network: str | None = None,
    weights: str = "",
    channels: int | None = None,
    resolution: int | None = None,
    bootstrap: int = 100,
    out: str | None = None,
    device: str | None = None,
) -> None:
    """Measure the health of a bank, or the quality of synthetic images.

    Args:
        path: a bank, whose latents are compared with white noise; or shards or a folder of images
            by class, which are compared with real ones.
        real: for images, the real ones: a folder, or another source as for invert.
        network: for images, whose features to compare: fashion (embedded: grey clothes), clip,
            inception (torch-fidelity's), or a network of timm such as resnet50.
        weights: of the network, a .safetensors file; by default those that it is known with.
        channels: of the images, 1 or 3; by default as the first synthetic one.
        resolution: to which images are brought; by default that of the first synthetic one.
        bootstrap: draws for the intervals of FID and KID; 0 leaves them out.
        out: folder to write evaluation.json, classes.csv and a plot to.
        device: such as cuda or cpu; by default the GPU if there is one.
    """
    from augment import evaluate as study
    from augment.bank import LatentBank
    from augment.diffusion import find_device
    from augment.networks import feature_network
    from augment.sources import as_source

    if (Path(path) / "manifest.json").exists():
        found = study.evaluate_bank(LatentBank.open(path))
    else:
        if real is None or network is None:
            raise UserError(
                "expected --real, images to compare with, and --network, eyes to see them by, such "
                "as fashion or resnet50, got none; only a bank is evaluated alone"
            )
        fake = study.open_images(path)
        first = study.form_of(fake)
        eyes = feature_network(network, weights, find_device(device))
        form = (channels or first[0], resolution or first[1])
        found = study.evaluate_images(fake, as_source(real), eyes, form, bootstrap)
    print(found)
    if out:
        found.write(out)
        print(f"\n{out}: evaluation.json, classes.csv, evaluation.png")


def merge(banks: str, out: str) -> None:
    """Make one bank of several of the same settings.

    Args:
        banks: their folders, with commas between.
        out: folder of the new one.
    """
    from augment import upkeep

    tell_of_bank(upkeep.merge(banks.split(","), out).path)


def split(bank: str, classes: str, out: str) -> None:
    """Make a bank of some classes of another.

    Args:
        bank: its folder.
        classes: their names, with commas between, in the order of the new labels.
        out: folder of the new one.
    """
    from augment import upkeep

    tell_of_bank(upkeep.split(bank, classes.split(","), out).path)


def export(shards: str, out: str) -> None:
    """Write the images of shards as a folder by class, with a metadata.jsonl.

    Args:
        shards: their folder.
        out: the new folder: out/class/00000000.jpg.
    """
    from augment.export import export_folder

    export_folder(shards, out)
    print(f"{out}: written")


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


def train() -> None:
    """Train a classifier with Lightning: train fit --config YAML; see train --help."""


def sweep() -> None:
    """Train and test with several seeds and values of settings; see sweep --help."""


def episodes() -> None:
    """Evaluate N-way K-shot episodes with synthetic images; see episodes --help."""


def refuse(options: dict[str, Any], *names: str) -> None:
    """Refuse options that the command has as its own.

    Raises:
        UserError: one of the names is among them.
    """
    for name in names:
        if name in options:
            raise UserError(
                f"expected {name} as an option of its own, got it among others; see --help"
            )


def parse_dtype(name: str | None) -> Any:
    """A torch dtype by name, or None.

    Raises:
        UserError: an unknown name.
    """
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return None if name is None else lookup(known, name, "dtype")


COMMANDS = {
    "invert": invert,
    "synthesize": synthesize,
    "train": train,
    "sweep": sweep,
    "episodes": episodes,
    "demo": demo,
    "evaluate": evaluate,
    "inspect": inspect,
    "verify": verify,
    "merge": merge,
    "split": split,
    "export": export,
}
SWITCHES = ("full", "dry_run", "clean", "links", "discard")
"""Options that may be given without a value, for true."""


def underscored(argument: str) -> str:
    """``--per-class=3`` as ``--per_class=3``: options may be spelled either way."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name in SWITCHES and not equals:  # jsonargparse wants a value
        return f"--{name}=true"
    return f"--{name}{equals}{value}"


def run(args: list[str]) -> None:
    """Dispatch; the commands of `training` are imported when they are asked for."""
    if args[:1] == ["train"]:
        from training.cli import main as lightning

        lightning(args[1:])
        return
    from jsonargparse import auto_cli

    commands: Any = COMMANDS
    if args[:1] == ["sweep"]:
        from training.sweep import sweep

        commands = {**COMMANDS, "sweep": sweep}
    elif args[:1] == ["episodes"]:
        from training.episodic import run_episodes

        commands = {**COMMANDS, "episodes": run_episodes}
    args = [underscored(argument) for argument in args]
    for place in range(len(args) - 1, 0, -1):  # a switch may be given a value
        if args[place] in ("true", "false") and args[place - 1].endswith("=true"):
            args[place - 1 : place + 1] = [args[place - 1].replace("=true", f"={args[place]}")]
    auto_cli(commands, args=args, as_positional=False, prog="latent-augment", exit_on_error=False)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Tell what a source or another part complains of, which jsonargparse wraps."""
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


SHOW = warnings.showwarning
"""How Python tells of warnings."""


def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Ours are one line, as errors are."""
    if issubclass(category, AugmentWarning):
        print(f"latent-augment: warning: {message}", file=sys.stderr)
    else:
        SHOW(message, category, *where)


def main() -> None:
    """Entry point. A user's mistake ends with one sentence and exit code 2."""
    warnings.showwarning = show_warning
    try:
        with unwrapped():
            run(sys.argv[1:])
    except UserError as error:
        print(f"latent-augment: {error}", file=sys.stderr)
        sys.exit(2)
    except ArgumentError as error:
        print(f"latent-augment: {' '.join(str(error).split())}; see --help", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("latent-augment: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
