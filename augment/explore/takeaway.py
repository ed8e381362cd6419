"""What is taken along from the explorer: lines that make an image again."""

import shlex
from typing import Any

from augment.explore.session import Choice, Explorer

LINES = """\
from augment import LatentBank, Plan, Rule, Sampling, Synthesizer, load_backbone
from augment.sources.images import to_pil

bank = LatentBank.open({bank!r})
backbone = load_backbone({recipe})
plan = Plan.from_json({plan!r})
sampling = Sampling(solver={solver!r}, steps={steps}, guidance={guidance})
made = Synthesizer(backbone, bank, Rule.parse({rule!r}), sampling)
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
