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

from augment.errors import BiasWarning, UserError


def invert(
    images: str,
    bank: str,
    backbone: str = "tiny",
    prompts: dict[str, str] | None = None,
    method: str = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Invert a folder of labelled images into a bank of latents.

    Args:
        images: folder with one sub-folder of PNG or JPEG files a class.
        bank: folder of the bank, made if needed; an interrupted job goes on.
        backbone: the diffusion model.
        prompts: a prompt for each class, as YAML such as '{Coat: top}'.
        method: the inversion.
        steps: network evaluations an image.
        guidance: scale of classifier-free guidance; 1 is none.
        batch_size: images a network call.
        device: such as cuda or cpu; by default the GPU if there is one.
    """
    from augment.bank import fill_bank
    from augment.diffusion import load_backbone
    from augment.measure import latent_statistics, predicted_bias
    from augment.sources import Folder

    source, model = Folder(images), load_backbone(backbone, device)
    filled = fill_bank(bank, model, source, prompts, method, steps, guidance, batch_size)
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
    solver: str = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    batch_size: int = 64,
    backbone: str | None = None,
    device: str | None = None,
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
        solver: the sampler.
        steps: network evaluations an image.
        guidance: scale of classifier-free guidance; 1 is none.
        batch_size: images a network call.
        backbone: the diffusion model; by default the one named in the bank.
        device: such as cuda or cpu; by default the GPU if there is one.
        nearest: mix an image, drawn at random, with its neighbours, as many as members says: by
            the distance of latents (latent), or of the vectors by image id of a .safetensors file.
    """
    from augment.bank import LatentBank
    from augment.diffusion import load_backbone
    from augment.plan import Plan, Planner
    from augment.synthesis import Synthesizer, write_folder

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
    model = load_backbone(backbone or opened.fingerprint["backbone"]["name"], device)
    synthesizer = Synthesizer(model, opened, rule, solver, steps, guidance, batch_size)
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
    if issubclass(category, BiasWarning):
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
