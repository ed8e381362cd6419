"""What is taken along from the explorer: lines that make an image again, and shards.

The shards are such as ``synthesize`` writes; each image has its own settings beside it, and each
export adds one shard to the folder.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from augment.bank.format import DIGITS
from augment.core.errors import UserError
from augment.core.files import in_use, locked
from augment.core.schema import write
from augment.explore.session import Choice, Explorer
from augment.shards.dataset import Sample, encode, write_shard
from augment.shards.format import (
    SCHEMA,
    SETTINGS,
    ShardSettings,
    read_settings,
    read_table,
    shard_path,
    write_info,
)
from augment.shards.verify import count_shards
from augment.shards.write import precision

LINES = """\
from augment import LatentBank, Plan, Synthesizer, load_backbone
from augment.sources.images import to_pil

bank = LatentBank.open({bank!r})
backbone = load_backbone({recipe})
plan = Plan.from_json({plan!r})
made = Synthesizer(
    backbone, bank, {rule!r}, solver={solver!r}, steps={steps}, guidance={guidance}
)
image = made.images([plan])[0]  # float32 (C, H, W) in [0, 1]
to_pil(image).save("centroid.png")
"""


def python(explorer: Explorer, choice: Choice) -> str:
    """Lines of Python that make the image of a choice, as they stand."""
    recipe = ", ".join(f"{key}={value!r}" for key, value in explorer.recipe.items())
    how = {key: getattr(choice, key) for key in ("rule", "solver", "steps", "guidance")}
    bank = str(explorer.bank.path.absolute())
    return LINES.format(bank=bank, recipe=recipe, plan=choice.plan.to_json(), **how)


def command(explorer: Explorer, choice: Choice) -> str | None:
    """The command that makes the image among others; None for weights that no dice threw.

    It is the one of the plan's index: ``shards[index]``.
    """
    plan, bank = choice.plan, explorer.bank
    again = plan.index // len(bank.classes)
    if choice.alpha is None or plan != explorer.draw(plan, choice.alpha, again):
        return None
    options: dict[str, Any] = {
        "bank": bank.path.absolute(), "out": "centroids", "per-class": again + 1,
        "rule": choice.rule, "alpha": choice.alpha, "seed": plan.seed,
        "members": len(plan.members), "noise": plan.noise, "solver": choice.solver,
        "steps": choice.steps, "guidance": choice.guidance, "extension": "png",
    }  # fmt: skip
    if explorer.recipe["name_or_path"] != bank.recipe["name_or_path"]:
        options["backbone"] = explorer.recipe["name_or_path"]
    if "device" in explorer.recipe:
        options["device"] = explorer.recipe["device"]
    words = [f"--{key} {shlex.quote(str(value))}" for key, value in options.items()]
    return " \\\n    ".join(["latent-augment synthesize", *words])


def export(explorer: Explorer, choices: Sequence[Choice]) -> Path:
    """Write the images of choices, exactly (PNG), as one more shard of the folder ``out``.

    Returns:
        The shard.

    Raises:
        UserError: there is no such folder, it is another job's, or nothing was chosen.
    """
    out = explorer.out
    if out is None or not choices:
        raise UserError(
            f"expected images to export and a folder for them, got {len(choices)} images and "
            f"{out or 'no folder'}; keep some, and start latent-augment explore with --out DIR"
        )
    settings, file, key = settings_of(explorer), out / SETTINGS, 0
    with locked(out):
        if not file.exists() and in_use(out):
            raise taken(out)
        if not file.exists():
            write(file, settings)
        old = read_settings(out)
        number = old.shards
        if replace(old, schema=SCHEMA) != replace(settings, shards=number):
            raise taken(out)
        if number:
            last, _ = read_table(shard_path(out, number - 1), len(settings.classes))
            key = last.samples[-1][0] + 1
        settings = replace(settings, shards=number + 1)
        path = shard_path(out, number)
        samples = (sample_of(explorer, choice, i) for i, choice in enumerate(choices, key))
        write_shard(path, samples, "png", wanted=len(choices), synthesis=settings)
        write(file, settings)
        write_info(out, count_shards(out).lengths)
    return path


def taken(out: Path) -> UserError:
    """What to say of a folder that is not ours to add to."""
    return UserError(
        f"expected {out} to be new, or exported to from this bank before, got a folder with "
        "something else; start latent-augment explore with another --out"
    )


def settings_of(explorer: Explorer) -> ShardSettings:
    """Return the settings of a folder without shards yet."""
    bank = explorer.bank
    known = {name: bank.digests(name) for name in bank.classes}
    facts = {
        "by": "explore",
        # so that no classifier is tested on an image that these come from
        "images": {n: {i: d[:DIGITS] for i, d in ids.items()} for n, ids in known.items()},
        "bank": bank.digest,
        "fingerprint": bank.fingerprint,
        "dtype": precision(explorer.backbone),
    }
    return ShardSettings(SCHEMA, bank.classes, 0, "png", **json.loads(json.dumps(facts)))


def sample_of(explorer: Explorer, choice: Choice, key: int) -> Sample:
    """The image of a choice with all that made it."""
    about = {**asdict(choice), "backbone": explorer.bank.fingerprint["backbone"], "scores": {}}
    return Sample(key, encode(explorer.image(choice), "png"), choice.plan.label, about)
