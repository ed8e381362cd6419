"""The card of exported images: a ``README.md`` as the Hugging Face hub shows and reads it.

Its front matter tells `datasets` the columns, so that labels come with the names of their classes,
as those of real images do. The licence stands there only where that of the model and that of the
real images are known.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from augment.core.errors import UserError
from augment.core.files import read_file
from augment.diffusion.checkpoints.licences import LINKS
from augment.shards.dataset import Shards
from augment.shards.format import ShardManifest

CARD = "README.md"
OURS = (
    "<!-- Written by latent-augment export, which replaces this file while this line is here. -->"
)

COLUMNS: dict[str, Any] = {
    "label": "label",
    "class_name": "string",
    "prompt": "string",
    "guidance": "float64",
    "members": ["string"],
    "weights": ["float64"],
    "noise": "float64",
    "seed": "int64",
    "epoch": "int64",
    "index": "int64",
    "classes": ["string"],
    "level": "float64",
    "context": "string",
}
"""Type of each column beside the image: those of `Shards.metadata`. In brackets: a list."""

SPELLED = {
    *("afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0"),
    *("bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd"),
    *("bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0"),
    *("cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
    *("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m"),
    *("deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1"),
    *("eupl-1.2", "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0"),
    *("gpl-3.0", "grok2-community", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1"),
    *("lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
    *("lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openmdw-1.0"),
    *("openmdw-1.1", "openrail", "openrail++", "osl-3.0", "pddl", "postgresql", "unlicense"),
    *("wtfpl", "zlib"),
}
"""Licences by which the hub knows them, of huggingface.co/docs/hub/repositories-licenses.

Those of SPDX in lower case (``bsl-1.0`` is Boost's), but for families (``bsd``, ``cc``, ``gfdl``,
``gpl``, ``lgpl``, ``odbl``, ``odc-by``, ``openrail``, ``pddl``) and terms of makers, which SPDX
does not have. Others are named as ``other``.
"""

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def present(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the `COLUMNS` that some row has."""
    seen = {name for row in rows for name in row}
    return [name for name in COLUMNS if name in seen]


def features(columns: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the features of columns, and of the image, as a card's front matter spells them."""
    names = {str(label): name for label, name in enumerate(classes)}
    found: list[dict[str, Any]] = [{"name": "image", "dtype": "image"}]
    for name in columns:
        kind = COLUMNS[name]
        if name == "label":
            found.append({"name": name, "dtype": {"class_label": {"names": names}}})
        else:
            found.append(
                {"name": name, **({"list": kind[0]} if isinstance(kind, list) else {"dtype": kind})}
            )
    return found


def card(
    shards: Shards,
    made: ShardManifest,
    columns: Sequence[str],
    data_files: str,
    place: str,
    model: str | None = None,
    images: str | None = None,
) -> str:
    """Write the text of a card.

    Args:
        shards: the images.
        made: how they were made.
        columns: names of columns beside the image.
        data_files: pattern of the files that hold the images.
        place: what ``load_dataset`` is to be given.
        model: licence of the diffusion model; by default that of the shards' manifest.
        images: licence of the real images.
    """
    import yaml  # here: only a card needs it

    model = model or made.licence
    size = next((name for most, name in SIZES.items() if len(shards) < most), "n>1M")
    head = {
        **_licence(model, images),
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "latent-augment"],
        "size_categories": [size],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": data_files}],
                "features": features(columns, shards.classes),
            }
        ],
    }
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    counts = [0] * len(shards.classes)
    for label in shards.targets:
        counts[label] += 1
    real = [len(made.images.get(name, ())) for name in shards.classes]
    facts = {
        "licence of the model": model or "unknown",
        "licence of the real images": images or "unknown",
        **_made_by(shards, made),
    }
    return "\n".join(
        [
            f"---\n{front}---\n\n{OURS}\n",
            f"# {len(shards):,} synthetic images of {len(shards.classes)} classes\n",
            "Each image is sampled by a diffusion model from a mixture of latents of real images of"
            "\nits class, by latent-augment. Its line of metadata names these images and their "
            "weights.\n",
            "| | |\n|---|---|",
            *(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()),
            "\n| class | synthetic images | real images |\n|---|---|---|",
            *(
                f"| {_cell(name)} | {count} | {n or ''} |"
                for name, count, n in zip(shards.classes, counts, real, strict=True)
            ),
            "\n```python\nfrom datasets import load_dataset\n",
            f'data = load_dataset({json.dumps(place)}, split="train")\n```\n',
        ]
    )


def _licence(model: str | None, images: str | None) -> dict[str, Any]:
    """Return the licence as the hub spells it; nothing if one of the two is unknown."""
    if not model or not images:
        return {}
    both = list(dict.fromkeys([images, model]))
    if SPELLED.issuperset(both):
        return {"license": both[0] if len(both) == 1 else both}
    link = next((LINKS[name] for name in both if name in LINKS), None)
    named = {"license": "other", "license_name": "-and-".join(both)}
    return named | ({"license_link": link} if link else {})


def _made_by(shards: Shards, made: ShardManifest) -> dict[str, Any]:
    """Return how the images were made, as far as the shards say it."""
    about = shards.about(0)
    alpha = made.alpha
    backbone = about.get("backbone")
    facts = {
        "model": backbone.get("name") if isinstance(backbone, dict) else None,
        "prompt of the first image": about.get("prompt"),
        "guidance": made.guidance,
        "rule": made.rule,
        "alpha": ", ".join(map(str, alpha)) if isinstance(alpha, list) else alpha,
        "members": "all" if made.job and made.members is None else made.members,
        "fresh noise": made.noise,
        "level": ", ".join(map(str, made.level)) if made.level else None,
        "solver": made.solver and f"{made.solver}, {made.steps} steps",
        "seed": made.seed,
        "filters": ", ".join(made.filters) or None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _cell(value: object) -> str:
    """Return a value as a cell of a Markdown table: one line, no markup of its own."""
    text = " ".join(str(value).split())
    for mark in "\\|`*_<[":
        text = text.replace(mark, f"\\{mark}")
    return text


def kept(path: Path) -> str | None:
    """Return the card at a path if the user edited it, so that it stays; else None.

    Raises:
        UserError: it cannot be read.
    """
    if not path.exists():
        return None
    text = read_file(path, "the card of images").decode("utf-8", "replace")
    return None if OURS in text else text


def check_licence(text: str, model: str | None, images: str | None) -> None:
    """Refuse a card without a licence, or that the hub would not read.

    Args:
        text: of the card.
        model: licence of the diffusion model, if known.
        images: licence of the real images, if known.

    Raises:
        UserError: it lacks the licence, or its front matter is damaged.
    """
    from huggingface_hub import DatasetCard

    try:
        data: Any = DatasetCard(text).data
        licence = data.license
    except Exception as error:  # of several types, by what is wrong with the YAML
        raise UserError(
            f"expected a card with front matter in YAML, got one that is not read ({error}); "
            f"repair {CARD}, or delete it and export again"
        ) from None
    if not licence:
        lacking = {"the model (--model-licence)": model, "the images (--images-licence)": images}
        unknown = " and of ".join(name for name, value in lacking.items() if not value)
        raise UserError(
            "expected the licences of the model and of the real images, to publish what was made "
            f"of them, got no licence of {unknown or f'the card {CARD}'}; pass it, such as mit or "
            "cc-by-4.0"
        )
