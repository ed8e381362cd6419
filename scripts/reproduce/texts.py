"""Text interpolation, and one latent with several prompts.

    python scripts/reproduce/texts.py --quick
    python scripts/reproduce/texts.py --backbone sd15 --prompts 'a red bus' 'a blue bus'

Ribeiro, *Exploring the latent space of text-to-image diffusion models*, 2023: the noise is fixed
and the embeddings of two prompts are interpolated, at guidance 7.5; and one noise is sampled with
four prompts. A picture is taken for coherent if it is about as near to its nearest real image, by
the features of the network, as pictures of the prompts themselves. Between two prompts it may show
what neither names, so that the class is no measure.
"""

from itertools import combinations
from typing import Any

import torch
from claims import once, options, record, sized
from judge import ci95, mean, open_judge, pictures, prompts_for
from torch import Tensor

from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.conditions import mix
from augment.diffusion.solver import sample
from augment.measure.features import nearest_distance
from augment.measure.smoothness import STOPS, istd
from augment.sources.images import sheet

GUIDANCE = 7.5


def between_texts(
    backbone: Backbone, noises: Tensor, ends: list[tuple[str, str]], how: dict[str, Any]
) -> Tensor:
    """Sample each noise (p, …) with embeddings between two prompts: (p, STOPS, …)."""
    place = torch.linspace(0, 1, STOPS)
    shares = torch.stack([1 - place, place], 1)
    words = [mix(backbone.condition(pair), shares) for pair in ends]
    texts = {key: torch.cat([word[key] for word in words]) for key in words[0]}
    latents = noises.repeat_interleave(STOPS, 0)
    return sample(backbone, latents, texts, **how).unflatten(0, (len(ends), STOPS))


def main() -> None:
    """Interpolate, sample, measure, draw, judge."""
    parser = options("Text interpolation, and one latent with several prompts.", "texts")
    parser.add_argument("--prompts", nargs="+", help="by default those of the images' classes")
    args = parser.parse_args()
    each, steps = sized(args, (1, 2), (3, 10), (40, 30))
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, 1)
    words = args.prompts or list(dict.fromkeys(prompts_for(backbone, source).values()))[:4]
    judge = open_judge(args, backbone, reference)
    how = {"solver": "fireflow", "steps": steps, "guidance": GUIDANCE}
    ends = [pair for pair in combinations(words, 2) for _ in range(each)]
    noises = normal(rng(0, "noise"), len(ends), *backbone.latent_shape)
    tag = f"{backbone.fingerprint['weights'][:8]}-{'-'.join(words)}-{len(ends)}-{steps}"
    made = once(
        args.out / f"{tag.replace('/', ' ')[:200]}.safetensors",
        lambda: {
            "between": between_texts(backbone, noises, ends, how),
            "prompts": torch.stack([
                sample(backbone, noises[::each], text, **how) for text in words
            ], 1),
        },
    )  # fmt: skip
    images = made["between"]
    features = judge.network(images.flatten(0, 1))
    far = nearest_distance(features, judge.real).unflatten(0, images.shape[:2])
    ratio = far[:, 1:-1].mean(1) / far[:, [0, -1]].mean(1)
    even = torch.tensor([istd(walk[None]) for walk in images])
    apart = (images[:, -1] - images[:, 0]).flatten(1).norm(dim=1)
    rows = []
    for number, pair in enumerate(combinations(words, 2)):
        own = slice(number * each, (number + 1) * each)
        rows.append({
            "from": pair[0], "to": pair[1], "ISTD / end to end": ci95(even[own] / apart[own]),
            "nearest real: between": ci95(far[own, 1:-1].mean(1)),
            "at the ends": ci95(far[own][:, [0, -1]].mean(1)), "ratio": ci95(ratio[own]),
        })  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = enumerate(combinations(words, 2))
    strips = {f"{a} to {b}": list(images[k * each]) for k, (a, b) in pairs}
    heads = [f"{k / (STOPS - 1):.1f}" for k in range(STOPS)]
    sheet(strips, heads).save(args.out / "texts.png")
    lines = {f"noise {k + 1}": list(line) for k, line in enumerate(made["prompts"])}
    sheet(lines, list(words)).save(args.out / "prompts.png")
    title = (
        f"one noise, embeddings between two of {len(words)} prompts, {each} noises each; "
        f"FireFlow {steps}, guidance {GUIDANCE}"
    )
    captions = {"texts": "Between two prompts", "prompts": "One noise a row, a prompt a column"}
    record(args, title, rows, {"ri-text": {"": mean(ratio)}}, **captions)


if __name__ == "__main__":
    main()
