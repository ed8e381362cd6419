"""How a bank and its images were made: the commands, the plans, and Python that makes them again.

Shards keep the settings of their job (``synthesis.json``) and the plan of each image. So the
planner can be put together again, and with it the plans of rejected candidates, which no shard
keeps: of an image of epoch e, the candidates of the epochs below e were rejected.

The report and the explorer show the text of `python` and `command`.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from augment.bank.bank import LatentBank
from augment.core.errors import UserError
from augment.diffusion.backbones.tiny import EMBEDDED
from augment.diffusion.sampling import Sampling
from augment.inversion import INVERTERS
from augment.plan.mixing import Mixing
from augment.plan.plan import Plan
from augment.plan.planner import Planner, round_robin
from augment.shards.dataset import Shards, open_shards
from augment.shards.format import ShardManifest, read_settings
from augment.shards.verify import Tally, count_shards
from augment.sources.prompts import prompts_of
from augment.synthesis.synthesizer import planner_of

MAX_SEARCHED = 200  # images of a class whose rejected candidates are looked for
PUBLIC = ("LatentBank", "Mixing", "Plan", "Planner", "Rule", "Sampling", "Synthesizer")
PUBLIC += ("load_backbone", "open_shards")  # names of `augment` that `python` may use


def python(
    bank: LatentBank,
    plan: str,
    rule: str,
    sampling: Sampling,
    recipe: Mapping[str, Any] | None = None,
    prompts: Mapping[str, str] | None = None,
    refine: Mapping[str, Any] | None = None,
    reference_rule: str | None = None,
) -> str:
    """Return the lines of Python that make an image again and save it as ``image.png``.

    Args:
        bank: the bank.
        plan: a Python expression of the plan.
        rule: name of the rule.
        sampling: how the centroid is sampled.
        recipe: arguments of `load_backbone`; by default those that the bank keeps.
        prompts: see `Synthesizer`.
        refine: settings of `SeedSelect`, if the centroid is refined.
        reference_rule: see `Synthesizer`.
    """
    loaded = "**bank.recipe"
    if recipe is not None:
        loaded = ", ".join(f"{key}={value!r}" for key, value in recipe.items())
    options = [f"Rule.parse({rule!r})", _expression(Sampling(**asdict(sampling)))]
    options += [f"prompts={prompts!r}"] if prompts else []
    options += [f"refine=SeedSelect(**{refine!r})"] if refine else []
    options += [f"reference_rule={reference_rule!r}"] if reference_rule else []
    body = f"""
bank = LatentBank.open({str(bank.path.absolute())!r})
backbone = load_backbone({loaded})
plan = {plan}
synthesizer = Synthesizer(backbone, bank, {", ".join(options)})
image = synthesizer.images([plan])[0]  # float32 (C, H, W) in [0, 1]
to_pil(image).save("image.png")
"""
    names = ", ".join(name for name in PUBLIC if re.search(rf"\b{name}\b", body))
    head = f"from augment import {names}\nfrom augment.sources.images import to_pil\n"
    head += "from augment.synthesis.refine import SeedSelect\n" if refine else ""
    return head + body


def _expression(value: Mixing | Sampling) -> str:
    """Return the expression of a value, without what has its default."""
    fields = [(f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value)]
    given = (f"{name}={own!r}" for name, own, usual in fields if own != usual)
    return f"{type(value).__name__}({', '.join(given)})"


def command(name: str, options: Mapping[str, Any], separator: str = " ") -> str:
    r"""Return a command line of options; those that are None are left out.

    Args:
        name: name of the command.
        options: value of each option.
        separator: what comes between options, such as ``" \\\n    "``.

    >>> command("invert", {"images": "my dir", "steps": 25, "prompts": None})
    "latent-augment invert --images 'my dir' --steps 25"
    """
    parts = [f"latent-augment {name}"]
    for key, value in options.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            parts.append(f"--{key.replace('_', '-')} {shlex.quote(text)}")
    return separator.join(parts)


@dataclass(frozen=True)
class ShardFolder:
    """Finished shards of a job of ``synthesize``.

    Args:
        path: the folder.
        manifest: what it is to hold.
        shards: the shards that are finished.
        tally: totals of their records.
    """

    path: Path
    manifest: ShardManifest
    shards: Shards
    tally: Tally

    @classmethod
    def open(cls, path: Path, bank: LatentBank) -> "ShardFolder":
        """Open the shards that were made with a bank.

        Raises:
            UserError: there are no shards, they are damaged, of classes that the bank lacks, or
                chosen by hand with an older version of the explorer.
        """
        manifest, shards = read_settings(path), open_shards(path, complete=False)
        if not manifest.job:
            raise UserError(
                f"expected shards of latent-augment synthesize in {path}, got images that were "
                "chosen one by one; leave --shards out"
            )
        strange = [name for name in shards.classes if name not in bank.members]
        if strange:
            raise UserError(
                f"expected shards of classes of bank {bank.path}, got {strange[0]!r} in {path}; "
                "give the bank that they were made with"
            )
        return cls(path, manifest, shards, count_shards(path))

    def rows(self, name: str) -> list[int]:
        """Return the indices of a class's images."""
        label = self.shards.class_to_idx.get(name)
        return np.flatnonzero(self.shards.rows[:, 1] == label).tolist()

    def indices(self, label: int) -> Iterator[int]:
        """Yield the indices, in the job, of a label's images that finished shards were to hold."""
        size = self.manifest.shard_size or 0
        for path in self.shards.paths:
            first = int(path.stem.removeprefix("shard-")) * size
            yield from (
                np.flatnonzero(self._labels[first : first + size] == label) + first
            ).tolist()

    @cached_property
    def _labels(self) -> np.ndarray:
        return np.array(round_robin(self.manifest.per_class, self.shards.classes))


@dataclass(frozen=True)
class Provenance:
    """How the synthetic images of a bank were, or would be, made.

    Args:
        bank: the bank.
        folder: its shards, if there are any.
        planner: the planner of the shards, or else the default one of ``synthesize``.
        planned: whether it is the planner of the shards.
    """

    bank: LatentBank
    folder: ShardFolder | None
    planner: Planner
    planned: bool

    @classmethod
    def of(cls, bank: LatentBank, path: Path | None) -> "Provenance":
        """Read what is known of a bank's shards, if there are any.

        Raises:
            UserError: see `ShardFolder.open`.
        """
        if path is None:
            return cls(bank, None, Planner(bank.members), False)
        folder = ShardFolder.open(path, bank)
        planner = _planner_of(bank, folder.manifest)
        if planner is None or (len(folder.shards) and not draws(planner, folder.shards.plan(0))):
            return cls(bank, folder, Planner(bank.members), False)
        return cls(bank, folder, planner, True)

    @property
    def sampling(self) -> Sampling:
        """How the images are sampled."""
        return Sampling() if self.folder is None else self.folder.manifest.sampling

    def prompts(self, name: str) -> dict[str, str]:
        """Return the prompt of a class, by its name, if it is not the bank's."""
        prompts = {} if self.folder is None else self.folder.manifest.prompts or {}
        return {name: prompts[name]} if name in prompts else {}

    def rejected(self, name: str) -> Iterator[Plan]:
        """Yield plans of a class's candidates that filters rejected."""
        folder = self.folder
        if folder is None or not self.planned or not folder.manifest.filters:
            return
        label, kept = self.bank.classes.index(name), set()
        for row in folder.rows(name):
            index = int(folder.shards.rows[row, 0])
            kept.add(index)
            if len(kept) <= MAX_SEARCHED:
                epochs = range(folder.shards.plan(row).epoch)
                yield from (self.planner(epoch, index, label) for epoch in epochs)
        for index in folder.indices(label):
            if index not in kept:
                tried = range(folder.manifest.candidates or 0)
                yield from (self.planner(epoch, index, label) for epoch in tried)

    def python(self, plan: Plan, rule: str, row: int | None = None) -> str:
        """Return the lines of Python that make the image of a plan again; see `python`.

        Args:
            plan: the plan.
            rule: name of the rule.
            row: index of the image in the shards, which keep the plans that no planner draws.
        """
        refine, mixing = None, self.planner.mixing
        if row is not None and self.folder is not None:
            refine = self.folder.manifest.refine
        if self.folder is None or row is None or draws(self.planner, plan):
            features = ", features=bank.features('latent')" if self.planner.features else ""
            place = f"({plan.epoch}, {plan.index}, {plan.label})"
            drawn = f"Planner(bank.members, {_expression(mixing)}{features}){place}"
        else:
            path = str(self.folder.path.absolute())
            drawn = f"open_shards({path!r}, complete=False).plan({row})"
        prompts = self.prompts(plan.class_name)
        return python(
            self.bank, drawn, rule, self.sampling, None, prompts, refine, mixing.reference_rule
        )


def _planner_of(bank: LatentBank, manifest: ShardManifest) -> Planner | None:
    """Return the planner of shards, if the bank still has the same images."""
    images = {name: tuple(ids) for name, ids in manifest.images.items()}
    if images != bank.members or list(images) != bank.classes or manifest.contexts:
        return None
    nearest = "latent" if manifest.nearest else None
    return planner_of(bank, dataclasses.replace(manifest.mixing, nearest=nearest))


def draws(planner: Planner, plan: Plan) -> bool:
    """Return whether a plan is one of a planner's."""
    known = plan.label < len(planner.images)
    return known and planner(plan.epoch, plan.index, plan.label) == plan


def invert_command(bank: LatentBank) -> str:
    """Return the command that made a bank, as far as its manifest records it."""
    recipe, method = bank.recipe, bank.inversion
    recipe = {key: value for key, value in recipe.items() if key != "local_files_only"}
    fields = {f.name for f in dataclasses.fields(INVERTERS[method["method"]])} - {"steps", "level"}  # type: ignore[arg-type]
    keeps, usage, name = bank.manifest.keeps, bank.manifest.usage, str(recipe.pop("name_or_path"))
    template = usage.template if usage else None if name in EMBEDDED else ""
    usual = prompts_of(bank.classes, template) if template else {}
    prompts = {known.name: known.prompt for known in bank.manifest.classes}
    prompts = {name: text for name, text in prompts.items() if text != usual.get(name, "")}
    same = usage is None or usage.guidance == method["guidance"]
    options = {
        "images": bank.manifest.source,
        "bank": str(bank.path),
        "backbone": name,
        "backbone_options": recipe or None,
        "prompt": template,
        "prompts": prompts or None,
        "inversion": method["method"],
        "steps": method["steps"],
        # a little above: the share of the steps is rounded down
        "level": round(method["level"] + 0.5 / method["steps"], 4) if "level" in method else None,
        "guidance": method["guidance"] if same else None,
        "inversion_options": {k: v for k, v in method.items() if k in fields} or None,
        "clean": True if "clean" in keeps else None,
        "background": None if bank.background == "white" else bank.background,
        "errors": None if "errors" in keeps else False,
    }
    text = command("invert", options)
    if method.get("captions"):
        return f"{text}\n# images were inverted with captions: add --captions and their file"
    return text


def synthesize_command(provenance: Provenance, folder: ShardFolder) -> str:
    """Return the command that made shards, and comments on what their settings do not record."""
    manifest, counts, alpha = folder.manifest, folder.manifest.per_class, folder.manifest.alpha
    several, nearest = isinstance(counts, dict), "latent" if provenance.planner.features else None
    options = {
        "bank": str(provenance.bank.path),
        "out": str(folder.path),
        "per_class": max(counts.values()) if several else counts,
        **vars(manifest.mixing),
        "alpha": ",".join(f"{a:g}" for a in alpha) if isinstance(alpha, list) else str(alpha),
        "level": ",".join(f"{level:g}" for level in manifest.level or ()) or None,
        "nearest": nearest,
        **vars(manifest.sampling),
        "refine": manifest.refine,
        "filters": manifest.filters or None,
        "candidates": manifest.candidates,
        "extension": manifest.extension,
        "quality": manifest.quality,
        "pixels": manifest.pixels,
        "shard_size": manifest.shard_size,
    }
    comments = {
        "classes had different numbers of images, see per_class": several,
        "prompts were other than the bank's, see prompts": bool(manifest.prompts),
        "contexts were drawn from a file, see contexts": bool(manifest.contexts),
        "neighbours were by vectors of a file": bool(manifest.nearest) and nearest is None,
        "a file is given by its SHA-256": bool(
            re.search(r'"[0-9a-f]{64}"', json.dumps([manifest.refine, manifest.filters]))
        ),
    }
    lines = [f"# {words}" for words, applies in comments.items() if applies]
    return "\n".join([command("synthesize", options), *lines])
