"""How a bank and its synthetic images were made: the plans, the commands, and the lines of Python.

Shards keep the settings of their job (``synthesis.json``) and each image its plan. So the planner
can be put together again, and with it the plans of candidates that a filter refused, which no shard
keeps: of an image of epoch e, the candidates of epochs below e were refused.
"""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from augment.bank.bank import LatentBank
from augment.core.errors import UserError
from augment.diffusion.sampling import Sampling
from augment.inversion import INVERTERS
from augment.plan.plan import Plan
from augment.plan.planner import Planner, round_robin
from augment.shards.dataset import Shards, open_shards
from augment.shards.format import SCHEMA, ShardManifest, read_settings
from augment.shards.verify import Tally, count_shards

SAMPLING = ("solver", "steps", "guidance")
"""Fields of `Sampling` that are kept with shards, or with each image of them."""

NO_SHARDS = ShardManifest(SCHEMA, [], 0, "jpg")
LOOKED_AT = 200
"""Images of a class among which candidates are looked for that were refused before them."""

IMPORTS = """\
from pathlib import Path
from augment import LatentBank, {more}, Rule, Sampling, Synthesizer, load_backbone
from augment.sources.images import save_image
"""
MAKE = """
bank = LatentBank.open({bank})
backbone = load_backbone(**bank.recipe)
synthesizer = Synthesizer(backbone, bank, Rule.parse({rule}){options})
plan = {plan}
save_image(synthesizer.images([plan])[0], Path("image.png"))"""


@dataclass(frozen=True)
class Making:
    """What is known of how synthetic images are, or were, made.

    Args:
        bank: the bank.
        folder: of shards, if there are any.
        settings: of the shards, ``synthesis.json``; those of an empty folder without.
        shards: those that are finished.
        tally: what their records say.
        planner: throws the dice of the images, or those of ``synthesize`` by default.
        planned: whether it is the planner of the shards.
    """

    bank: LatentBank
    folder: Path | None
    settings: ShardManifest
    shards: Shards | None
    tally: Tally
    planner: Planner
    planned: bool

    @classmethod
    def of(cls, bank: LatentBank, folder: Path | None) -> "Making":
        """Read what is there.

        Raises:
            UserError: there are no shards, they are damaged, or of classes that the bank has not.
        """
        usual = Planner(bank.members)
        if folder is None:
            return cls(bank, None, NO_SHARDS, None, Tally(), usual, False)
        settings, tally = read_settings(folder), count_shards(folder)
        shards = open_shards(folder, complete=False)
        strange = [name for name in shards.classes if name not in bank.members]
        if strange:
            raise UserError(
                f"expected shards of classes of bank {bank.path}, got {strange[0]!r} in {folder}; "
                "give the bank that they were made with"
            )
        planner = planner_of(bank, settings)
        if planner is None or (len(shards) and not throws(planner, shards.plan(0))):
            return cls(bank, folder, settings, shards, tally, usual, False)
        return cls(bank, folder, settings, shards, tally, planner, True)

    @property
    def job(self) -> bool:
        """Whether the settings are those of a job of ``synthesize``; ``explore`` has others."""
        return self.settings.job

    @property
    def sampling(self) -> Sampling:
        """How the shards were sampled; by default as the bank was inverted."""
        return self.settings.sampling if self.job else Sampling()

    def rows(self, name: str) -> list[int]:
        """The indices of a class's images in the shards."""
        if self.shards is None or name not in self.shards.class_to_idx:
            return []
        label = self.shards.class_to_idx[name]
        return np.flatnonzero(self.shards.rows[:, 1] == label).tolist()

    def refused(self, name: str, rows: list[int]) -> Iterator[Plan]:
        """Plans of a class's candidates that filters refused.

        Args:
            name: of the class.
            rows: of its images that were kept.
        """
        if self.shards is None or not self.planned or not self.settings.filters:
            return
        label, kept = self.shards.class_to_idx[name], set()
        for row in rows:
            key = int(self.shards.rows[row, 0])
            kept.add(key)
            if len(kept) <= LOOKED_AT:
                epochs = range(self.shards.plan(row).epoch)
                yield from (self.planner(epoch, key, label) for epoch in epochs)
        for index in self._finished(label):
            if index not in kept:
                tried = range(self.settings.candidates or 0)
                yield from (self.planner(epoch, index, label) for epoch in tried)

    def _finished(self, label: int) -> Iterator[int]:
        """The images of a label that were to be in the shards that are finished."""
        assert self.shards is not None
        size = self.settings.shard_size or 0
        for path in self.shards.paths:
            first = int(path.stem.removeprefix("shard-")) * size
            mine = np.flatnonzero(self._labels[first : first + size] == label) + first
            yield from mine.tolist()

    @cached_property
    def _labels(self) -> np.ndarray:
        """The label of each image of the shards' job."""
        assert self.shards is not None
        return np.array(round_robin(self.settings.per_class, self.shards.classes))

    def code(self, from_shards: bool = False) -> str:
        """Python that makes an image again, with ``@names@`` for what differs between images.

        Args:
            from_shards: take the plan from the shards; else throw its dice again.
        """
        shown = {key: literal(getattr(self.sampling, key)) for key in SAMPLING if self.job}
        if self.sampling.interval != (0.0, 1.0):
            shown["interval"] = repr(self.sampling.interval)
        if from_shards and not self.job:
            shown = {key: f"@{key}@" for key in SAMPLING}
        how = ", ".join(f"{key}={value}" for key, value in shown.items())
        options = f", Sampling({how})"
        options += ", prompts={@class@: @prompt@}" if self.job and self.settings.prompts else ""
        more, head = ("open_shards" if from_shards else "Mixing, Planner"), IMPORTS
        if from_shards and self.settings.refine:
            head += "from augment.synthesis.refine import SeedSelect\n"
            options += f", refine=SeedSelect(**{self.settings.refine!r})"
        if from_shards:
            plan = f"open_shards({literal(str(self.folder))}, complete=False).plan(@row@)"
        else:
            plan = f"Planner(bank.members{self._dice()})(@epoch@, @index@, @label@)"
        made = {"bank": literal(str(self.bank.path)), "rule": "@rule@", "options": options}
        return head.format(more=more) + MAKE.format(**made, plan=plan)

    def _dice(self) -> str:
        """The planner's arguments, but for the bank's images."""
        mixing, alpha = self.planner.mixing, self.planner.mixing.concentration
        shown = 'float("inf")' if alpha == math.inf else repr(alpha)
        words = f"seed={mixing.seed}, alpha={shown}, members={mixing.members}, noise={mixing.noise}"
        features = ', features=bank.features("latent")' if self.planner.features else ""
        return f", Mixing({words}){features}"


def literal(value: Any) -> str:
    """A value in Python, strings in double quotes as the page writes them."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def planner_of(bank: LatentBank, settings: ShardManifest) -> Planner | None:
    """The planner of shards, if the bank has the same images still, and no vectors of others."""
    if not settings.job:
        return None
    images = {name: tuple(ids) for name, ids in settings.images.items()}
    if images != bank.members or list(images) != bank.classes:
        return None
    features = bank.features("latent") if settings.nearest else None
    return Planner(bank.members, settings.mixing, features=features)


def throws(planner: Planner, plan: Plan) -> bool:
    """Whether a plan is one of a planner."""
    known = plan.label < len(planner.images)
    return known and planner(plan.epoch, plan.index, plan.label) == plan


def command(name: str, options: dict[str, Any]) -> str:
    """A command line of its options; those that are None are left out.

    >>> command("invert", {"images": "my dir", "steps": 25, "prompts": None})
    "latent-augment invert --images 'my dir' --steps 25"
    """
    parts = ["latent-augment", name]
    for key, value in options.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            parts += [f"--{key.replace('_', '-')}", text]
    return " ".join(shlex.quote(part) for part in parts)


def invert_command(bank: LatentBank) -> str:
    """The command that made a bank, as far as its manifest tells."""
    recipe, method = bank.recipe, bank.inversion
    recipe = {key: value for key, value in recipe.items() if key != "local_files_only"}
    fields = {f.name for f in dataclasses.fields(INVERTERS[method["method"]])} - {"steps"}  # type: ignore[arg-type]
    prompts = {known.name: known.prompt for known in bank.manifest.classes}
    keeps = bank.manifest.keeps
    options = {
        "images": bank.manifest.source,
        "bank": str(bank.path),
        "backbone": str(recipe.pop("name_or_path")),
        "backbone_options": recipe or None,
        "prompts": {name: text for name, text in prompts.items() if text} or None,
        "inversion": method["method"],
        **{key: method[key] for key in ("steps", "guidance")},
        "inversion_options": {k: v for k, v in method.items() if k in fields} or None,
        "clean": True if "clean" in keeps else None,
        "background": None if bank.background == "white" else bank.background,
        "errors": None if "errors" in keeps else False,
    }
    return command("invert", options)


def synthesize_command(making: Making) -> str:
    """The command that made shards, and a comment on what their settings do not tell."""
    folder = str(making.folder)
    kept: Any = making.settings
    counts, alpha = kept.per_class, kept.alpha
    several = isinstance(counts, dict)
    options = {
        "bank": str(making.bank.path),
        "out": folder,
        "per_class": max(counts.values()) if several else counts,
        **{key: getattr(kept, key) for key in ("rule", "seed", "members", "noise", "solver")},
        "alpha": ",".join(f"{a:g}" for a in alpha) if isinstance(alpha, list) else str(alpha),
        **{key: getattr(kept, key) for key in ("steps", "guidance", "interval", "batch_size")},
        "nearest": "latent" if making.planner.features else None,
        "refine": kept.refine,
        "filters": kept.filters or None,
        **{key: getattr(kept, key) for key in ("candidates", "extension", "quality", "pixels")},
        "shard_size": kept.shard_size,
    }
    unknown = {
        "classes had different numbers of images, see per_class": several,
        "prompts were other than the bank's, see prompts": bool(kept.prompts),
        "neighbours were by vectors of a file": bool(kept.nearest) and not making.planner.features,
        "a file is given by its SHA-256": bool(re.search(r'"[0-9a-f]{64}"', json.dumps(
            [kept.refine, kept.filters]
        ))),
    }  # fmt: skip
    comments = "".join(f"\n# {words}" for words, so in unknown.items() if so)
    return command("synthesize", options) + comments
