"""The command ``latent-augment``.

Every function here is a sub-command and its arguments are the options (jsonargparse); heavy
modules are imported when a command runs, so that ``--help`` is quick.
"""

import math
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from statistics import fmean
from typing import Any

from augment.errors import AugmentWarning, UserError, lookup


def invert(
    images: str,
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
) -> None:
    """Invert a folder of labelled images into a bank of latents.

    Args:
        images: folder with one sub-folder of PNG or JPEG files a class.
        bank: folder of the bank, made if needed; an interrupted job goes on.
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
    """
    from augment.bank import fill_bank
    from augment.diffusion import load_backbone
    from augment.inversion import inverter
    from augment.measure import latent_statistics, predicted_bias
    from augment.prompts import class_prompts
    from augment.sources import Folder

    source, texts = Folder(images), dict(prompts or {})
    if prompt:
        texts |= class_prompts([name for name in source.classes if name not in texts], prompt)
    settings, options = inversion_options or {}, backbone_options or {}
    refuse(settings, "steps", "guidance", "batch_size", "path", "backbone", "source", "prompts")
    refuse(options, "name_or_path", "device", "dtype")
    inverter(inversion, steps=steps, **settings)  # before gigabytes are loaded
    model = load_backbone(backbone, device, parse_dtype(dtype), **options)
    filled = fill_bank(
        bank, model, source, texts, inversion, steps, guidance, batch_size, **settings
    )
    count = sum(map(len, filled.members.values()))
    print(f"{bank}: {count} latents of {len(filled.classes)} classes")
    found = {name: latent_statistics(filled.latents(name)) for name in filled.classes}
    worst = max(found, key=lambda name: found[name].largest)
    print(f"\nclass {worst}, whose channel means are largest:\n{found[worst]}")
    if found[worst].biased:
        grown = predicted_bias(found[worst], found[worst].count, math.inf)
        print(
            f"all {found[worst].count} of them mixed in equal parts by a rule without a mean split "
            f"(fix/0) would have channel means up to {grown:.2f}; take one with /chm or /lp"
        )


def synthesize(
    bank: str,
    out: str,
    per_class: int = 100,
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
) -> None:
    """Synthesize images from random centroids of a bank's latents.

    Args:
        bank: folder of the bank.
        out: folder for the images, out/class/000000.png; an interrupted job goes on.
        per_class: images a class.
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
    """
    from augment.bank import LatentBank
    from augment.centroid import Rule
    from augment.diffusion import load_backbone
    from augment.plan import Plan, Planner
    from augment.prompts import class_prompts
    from augment.synthesis import Synthesizer, solver_of, write_folder

    opened = LatentBank.open(bank)
    try:
        alphas = [float(number) for number in str(alpha).split(",")]
    except ValueError:
        raise UserError(
            f"expected a number, inf or numbers such as 10,1,1 for alpha, got {alpha!r}"
        ) from None
    concentration = alphas if len(alphas) > 1 else alphas[0]
    features = None if nearest is None else opened.features(nearest)
    planner = Planner(opened.members, seed, concentration, members, noise, features=features)
    Rule.parse(rule)  # what can be refused is refused before gigabytes are loaded
    solver_of(opened, solver, steps)
    options = backbone_options or {}
    refuse(options, "name_or_path", "device", "dtype")
    recipe = {**opened.recipe, **({"name_or_path": backbone} if backbone else {})}
    if Path(recipe["name_or_path"]).is_absolute() and not Path(recipe["name_or_path"]).exists():
        raise UserError(
            f"expected the backbone that made the bank at {recipe['name_or_path']}, got nothing "
            "there; say where it is with --backbone"
        )
    model = load_backbone(device=device, dtype=parse_dtype(dtype), **{**recipe, **options})
    prompts = class_prompts(opened.classes, prompt) if prompt else None
    synthesizer = Synthesizer(
        model, opened, rule, solver, steps, guidance, batch_size, interval, prompts
    )
    made = write_folder(synthesizer, planner, per_class, out)
    with (Path(out) / "plans.jsonl").open(encoding="utf-8") as lines:
        plans = [Plan.from_json(line) for line in lines]
    count = fmean(plan.effective_count for plan in plans)
    mixed = fmean(len(plan.members) for plan in plans)
    print(
        f"{out}: {per_class} images of each of {len(opened.classes)} classes ({made} made now); "
        f"each mixes {count:.1f} of {round(mixed, 1):g} members on average (effective count)"
    )


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


COMMANDS = {"invert": invert, "synthesize": synthesize, "train": train, "demo": demo}


def underscored(argument: str) -> str:
    """``--per-class=3`` as ``--per_class=3``: options may be spelled either way."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    if name == "full":  # a switch; jsonargparse wants a value
        return argument if equals else "--full=true"
    return f"--{name.replace('-', '_')}{equals}{value}"


def run(args: list[str]) -> None:
    """Dispatch; ``train`` hands its arguments to Lightning's own parser."""
    if args[:1] == ["train"]:
        from training.cli import main as lightning

        lightning(args[1:])
    else:
        from jsonargparse import auto_cli

        args = [underscored(argument) for argument in args]
        auto_cli(
            COMMANDS, args=args, as_positional=False, prog="latent-augment", exit_on_error=False
        )


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
