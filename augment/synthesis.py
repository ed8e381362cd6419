"""Plans to images: the one place where bank, rule and backbone meet.

A centroid is computed sample by sample in float32, so it is the same to the last bit in any batch.
The network then works on batches; its images are the same to the last bit for the same batch
layout on the same device, and within 1e-4 otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from augment.bank import LatentBank
from augment.centroid.rule import Rule
from augment.diffusion.backbone import Backbone, check_batch
from augment.diffusion.solver import SOLVERS, check_steps, sample
from augment.errors import UserError, lookup
from augment.files import check_folder, read_json, write_bytes, write_json
from augment.images import save_image
from augment.plan import Plan, Planner
from augment.seeds import normal, rng


@dataclass
class Synthesizer:
    """Makes the images of plans.

    Args:
        backbone: the model the bank was inverted with.
        bank: the latents.
        rule: how they are mixed, such as ``fade/chm``.
        solver, steps, guidance, batch_size: see `augment.sample`.

    Raises:
        BankMismatch: the bank is of another backbone.
        UserError: an unknown rule or solver, or no steps.
    """

    backbone: Backbone
    bank: LatentBank
    rule: Rule | str = "fade/chm"
    solver: str = "ddim"
    steps: int = 50
    guidance: float = 1.0
    batch_size: int = 64
    _latents: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.rule = Rule.parse(str(self.rule))
        lookup(SOLVERS, self.solver, "solver")
        check_steps(self.steps)
        check_batch(self.batch_size)
        self.bank.check(self.backbone)

    @cached_property
    def rows(self) -> dict[str, dict[str, int]]:
        """Where in its class an image id stands."""
        return {
            name: {i: row for row, i in enumerate(ids)} for name, ids in self.bank.members.items()
        }

    def latents(self, class_name: str) -> Float[Tensor, "n c h w"]:
        """A class's latents, read once."""
        if class_name not in self._latents:
            self._latents[class_name] = self.bank.latents(class_name)
        return self._latents[class_name]

    def centroid(self, plan: Plan) -> Float[Tensor, "c h w"]:
        """The latent of a plan.

        Raises:
            UserError: the bank lacks one of the plan's images.
        """
        rows = self.rows.get(plan.class_name, {})
        unknown = [i for i in plan.members if i not in rows]
        if unknown:
            raise UserError(
                f"expected the plan's images in class {plan.class_name!r} of {self.bank.path}, got "
                f"no {unknown[0]} there"
            )
        if len(plan.weights) != len(plan.members):
            raise UserError(
                f"expected a weight for each of a plan's {len(plan.members)} members, got "
                f"{len(plan.weights)}"
            )
        points = self.latents(plan.class_name)[[rows[i] for i in plan.members]]
        weights = torch.tensor(plan.weights, dtype=torch.float64)
        if plan.noise:
            fresh = normal(rng(plan.seed, "noise", plan.epoch, plan.index), *points.shape[1:])
            points = torch.cat([points, fresh[None]])
            weights = torch.cat([weights * (1 - plan.noise), weights.new_tensor([plan.noise])])
        return self.rule(points[None], weights.float()[None])[0]  # type: ignore[operator]

    def images(self, plans: Sequence[Plan]) -> Float[Tensor, "n c h w"]:
        """The images of plans, float32 in [0, 1] on the backbone's device."""
        centroids = torch.stack([self.centroid(plan) for plan in plans])
        prompts = [self.bank.prompt(plan.class_name) for plan in plans]
        return sample(
            self.backbone,
            centroids,
            prompts,
            self.solver,
            self.steps,
            self.guidance,
            self.batch_size,
        )


def write_folder(
    synthesizer: Synthesizer, planner: Planner, per_class: int, out: str | Path
) -> int:
    """Synthesise ``per_class`` images a class into ``out/class/000000.png``.

    ``out/synthesis.json`` holds the settings and ``out/plans.jsonl`` the plan of every image, in
    the order of the index that names its file; an interrupted job goes on where it stopped.

    Returns:
        How many images were made by this call.

    Raises:
        UserError: the folder holds the images of other settings.
    """
    out = Path(out)
    check_folder(out)
    if per_class < 1:
        raise UserError(f"expected at least 1 image a class, got {per_class}")
    for name in planner.images:  # a harmed chunk is found before anything is written
        synthesizer.latents(name)
    settings = {
        "per_class": per_class,
        "rule": str(synthesizer.rule),
        **{key: getattr(synthesizer, key) for key in ("solver", "steps", "guidance")},
        **{key: getattr(planner, key) for key in ("seed", "alpha", "members", "noise")},
        "images": {name: list(ids) for name, ids in planner.images.items()},
        "fingerprint": synthesizer.bank.fingerprint,
    }
    if (out / "synthesis.json").exists():
        if read_json(out / "synthesis.json", "synthetic images") != settings:
            raise UserError(
                f"expected {out} to be new or of the same settings, got images of others; "
                "use a new folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"expected {out} to be new or empty, got a folder in use; use a new one")
    plans = [planner(0, index) for index in range(per_class * len(planner.images))]
    write_json(out / "synthesis.json", settings)
    write_bytes(out / "plans.jsonl", "".join(plan.to_json() + "\n" for plan in plans).encode())
    made = 0
    with tqdm(
        total=len(plans), desc=f"synthesize {synthesizer.rule}", unit="image", delay=2
    ) as bar:
        for start in range(0, len(plans), synthesizer.batch_size):
            batch = plans[start : start + synthesizer.batch_size]
            files = [out / plan.class_name / f"{plan.index:06d}.png" for plan in batch]
            if not all(file.exists() for file in files):
                for image, file in zip(synthesizer.images(batch), files, strict=True):
                    save_image(image, file)
                made += len(files)
            bar.update(len(files))
    return made
