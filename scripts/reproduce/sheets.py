"""Contact sheets of centroids with prompts and guidance, and a tour through several images.

    python scripts/reproduce/sheets.py --quick
    python scripts/reproduce/sheets.py --backbone sd35-medium --images DIR --classes shark crate …

Landolsi & Kahl, *Addressing degeneracies in latent interpolation for diffusion models*, arXiv
2505.07481: Fig. 1, centroids of N = 2, 8, 32, 48, 64, 96 images of a class by LIN, FIX and the
channel-mean split; Fig. 8 and 12, fix/0, fix/chm and nin/chm over N; Fig. 9, N = 12 in five
classes, fix/0 above nin/chm; §7, morphing of many images: `augment.centroid.tour`. Images are
inverted by published DDIM with the prompt of their class, and centroids sampled with it at the
guidance of the backbone's family, or at 7.5 if the family has none. The table has one centroid a
cell, so no interval.
"""

from typing import Any

import torch
from claims import once, options, record, sized
from judge import open_judge, pictures, prompts_for
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule, tour
from augment.diffusion import load_backbone
from augment.diffusion.backbone import Backbone
from augment.diffusion.sampling import Sampling
from augment.plan.plan import Plan
from augment.sources import Slice, Source
from augment.sources.images import sheet
from augment.synthesis.synthesizer import Synthesizer

FIG_1 = {"LIN": "lin/0", "FIX": "fix/0", "channel mean": "fix/chm"}
FIG_8 = ("fix/0", "fix/chm", "nin/chm")
FIG_9 = ("fix/0", "nin/chm")
TOUR = ("fix/0", "nin/chm", "fade/chm")


class Some(Slice):
    """The first images of some classes: many of the first class, few of the others."""

    def __init__(self, source: Source, classes: list[str], many: int, few: int) -> None:
        super().__init__(source)
        counts = [many, *[few] * (len(classes) - 1)]
        self.ids = {name: self.ids[name][:n] for name, n in zip(classes, counts, strict=True)}


class Studio:
    """Makes the centroids of a bank, with prompts and guidance.

    Args:
        backbone: the model.
        bank: the latents.
        guidance: scale of guidance in sampling.
    """

    def __init__(self, backbone: Backbone, bank: LatentBank, guidance: float) -> None:
        self.backbone, self.bank, self.sampling = backbone, bank, Sampling(guidance=guidance)

    def plan(self, label: int, count: int) -> Plan:
        """Mix the first images of a class in equal parts."""
        name = self.bank.classes[label]
        return Plan.equal(label, name, self.bank.members[name][:count])

    def images(self, rule: str, plans: list[Plan]) -> Tensor:
        """Make the images of plans by a rule."""
        by = Synthesizer(self.backbone, self.bank, Rule.parse(rule), self.sampling)
        return by.images(plans)

    def tour(self, rule: str, label: int, members: int, count: int) -> Tensor:
        """Make the images of a closed path through images of a class."""
        by = Synthesizer(self.backbone, self.bank, Rule.parse(rule), self.sampling)
        plan = self.plan(label, members)
        latents = tour(self.bank.gather([plan])[0][0], count, by.rule)
        return by.sample(latents, [plan] * count)


def main() -> None:
    """Invert, mix, sample, draw."""
    parser = options("Contact sheets of centroids: arXiv 2505.07481.", "sheets")
    parser.add_argument("--classes", nargs="+", help="five; by default the first ones")
    args = parser.parse_args()
    counts, above, steps, stops = sized(
        args, ((2, 4), 3, 2, 4), ((2, 4, 8, 16, 32, 48, 64, 96), 12, 20, 12),
        ((2, 4, 8, 16, 32, 48, 64, 96), 12, 50, 24),
    )  # fmt: skip
    backbone = load_backbone(args.backbone)
    whole, reference = pictures(args, counts[-1])
    names = args.classes or whole.classes[:5]
    source = Some(whole, names, counts[-1], above)
    prompts = prompts_for(backbone, source)
    guidance = backbone.usage.guidance if backbone.usage.guidance != 1 else 7.5
    stem = f"{backbone.fingerprint['weights'][:8]}-{counts[-1]}-{steps}-{'-'.join(names)}"[:120]
    bank = fill_bank(
        args.out / f"bank-{stem}", backbone, source, prompts, "published_ddim", steps=steps,
        guidance=1.0, stored=(),
    )  # fmt: skip
    studio, members = Studio(backbone, bank, guidance), max(stops // 2, 2)
    rules = list(dict.fromkeys([*FIG_1.values(), *FIG_8]))
    first = {rule: [studio.plan(0, count) for count in counts] for rule in rules}
    ninth = [studio.plan(label, above) for label in range(len(names))]
    made = once(
        args.out / f"{stem}-{guidance:g}.safetensors",
        lambda: {
            **{f"1 {rule}": studio.images(rule, plans) for rule, plans in first.items()},
            **{f"9 {rule}": studio.images(rule, ninth) for rule in FIG_9},
            **{f"tour {rule}": studio.tour(rule, 0, members, stops) for rule in TOUR},
        },
    )
    shown = [k for k, n in enumerate(counts) if n in (2, 8, 32, 48, 64, 96) or args.toy]
    eighth = [k for k, n in enumerate(counts) if n & (n - 1) == 0]
    sheets: dict[str, tuple[dict[str, list[Tensor]], list[str]]] = {
        "sheet_1": (
            {title: list(made[f"1 {rule}"][shown]) for title, rule in FIG_1.items()},
            [f"N = {counts[k]}" for k in shown],
        ),
        "sheet_8": (
            {rule: list(made[f"1 {rule}"][eighth]) for rule in FIG_8},
            [f"N = {counts[k]}" for k in eighth],
        ),
        "sheet_9": ({rule: list(made[f"9 {rule}"]) for rule in FIG_9}, [n[:10] for n in names]),
        "tour": (
            {rule: list(made[f"tour {rule}"]) for rule in TOUR},
            [f"image {k // 2 + 1}" if k % 2 == 0 else "" for k in range(stops)],
        ),
    }
    for name, (lines, heads) in sheets.items():
        sheet(lines, heads).save(args.out / f"{name}.png")
    judge = open_judge(args, backbone, reference)
    label = whole.classes.index(names[0])
    rows = []
    for rule in rules:
        assessed = judge.assess(made[f"1 {rule}"], torch.full((len(counts),), label))
        row: dict[str, Any] = {"rule": rule}
        far = assessed["distance"].tolist()
        rows.append(row | {f"N = {n}": f"{x:.3f}" for n, x in zip(counts, far, strict=True)})
    title = (
        f"class distance of one centroid of N images of {names[0]}, inverted by published DDIM "
        f"{steps} with the prompt {prompts[names[0]]!r}, sampled at guidance {guidance:g}"
    )
    captions = {
        "sheet_1": f"Fig. 1: {names[0]}", "sheet_8": f"Fig. 8, 12: {names[0]}",
        "sheet_9": f"Fig. 9: N = {above}", "tour": f"§7: a closed tour through {members} images",
    }  # fmt: skip
    record(args, title, rows, {}, **captions)


if __name__ == "__main__":
    main()
