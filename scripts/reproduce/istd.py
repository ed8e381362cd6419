"""ISTD of a backbone as published: how evenly images change along walks between two noises.

    python scripts/reproduce/istd.py --quick
    python scripts/reproduce/istd.py --backbone sd15 --captions captions.txt

Guo et al., *Smooth Diffusion*, arXiv 2312.04410, §4.2: two noises for each of 500 captions of COCO,
the same for every model; slerp at η = 0, 0.1 … 1; 50 DDIM steps at guidance 7.5; the standard
deviation of the ten distances of neighbours, of pixels in [0, 1], averaged over captions. `tiny`
takes the prompts that it was trained with, in turn.
"""

from pathlib import Path

import torch
from claims import options, record, sized
from judge import ci95, pictures, prompts_for

from augment.diffusion import load_backbone
from augment.measure.smoothness import istd, walks
from augment.sources.images import sheet


def main() -> None:
    """Walk, sample, measure."""
    parser = options("ISTD as published: arXiv 2312.04410.", "istd")
    parser.add_argument("--captions", type=Path, help="a text file with a caption a line")
    args = parser.parse_args()
    count, steps = sized(args, (2, 2), (16, 20), (500, 50))
    backbone = load_backbone(args.backbone)
    if args.captions:
        texts = args.captions.read_text("utf-8").split("\n")[:count]
    else:
        words = list(dict.fromkeys(prompts_for(backbone, pictures(args, 1)[0]).values()))
        texts = [words[k % len(words)] for k in range(count)]
    rows = []
    for guidance in (7.5, 1.0):
        made = walks(backbone, texts, solver="ddim", steps=steps, guidance=guidance).cpu()
        own = torch.tensor([istd(walk[None]) for walk in made])
        ends = (made[:, -1] - made[:, 0]).flatten(1).norm(dim=1)
        rows.append({
            "guidance": f"{guidance:g}", "ISTD": ci95(own), "end to end": ci95(ends),
            "ISTD / end to end": ci95(own / ends),
        })  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    strip = [f"{k / (made.shape[1] - 1):.1f}" for k in range(made.shape[1])]
    sheet({texts[0][:12]: list(made[0])}, strip).save(args.out / "istd.png")
    title = f"ISTD of {args.backbone}, {count} walks by slerp, DDIM {steps}, pixels in [0, 1]"
    record(args, title, rows, {}, istd="A walk without guidance")


if __name__ == "__main__":
    main()
