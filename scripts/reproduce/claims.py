"""What all reproductions share: options, a cache of finished parts, claims and verdicts."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from augment.core.files import write_bytes, write_json, write_table
from augment.report.evaluate import markdown

sys.path.append(str(Path(__file__).parents[1]))  # for what other scripts have

VERDICTS = {True: "holds", False: "does not hold", None: "within noise"}


def options(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every reproduction has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer samples: minutes on two cores")
    parser.add_argument("--backbone", default="tiny", help="as for latent-augment invert")
    parser.add_argument("--images", type=Path, help="folder of class folders; default embedded")
    parser.add_argument("--network", default="fashion", help="the judge, as for evaluate")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce") / name)
    return parser


def once(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load tensors from a file, which is made first if it is missing."""
    if not path.exists():
        made = {key: value.cpu().contiguous() for key, value in make().items()}
        write_bytes(path, save(made))
    return load_file(path)


def claim(claimed: str, here: str, verdict: bool | None) -> dict[str, str]:
    """Return one claim: what was published, what was found, and whether it holds; None is noise."""
    return {"claimed": claimed, "here": here, "verdict": VERDICTS[verdict]}


def conclude(
    args: argparse.Namespace, rows: Sequence[dict[str, Any]], claims: Sequence[dict[str, str]]
) -> None:
    """Write ``table.csv`` and ``claims.json``, and print both."""
    columns = list(rows[0])
    write_table(args.out / "table.csv", [columns, *(list(row.values()) for row in rows)])
    settings = {key: str(value) for key, value in vars(args).items()}
    write_json(args.out / "claims.json", {"settings": settings, "claims": list(claims)})
    for table in (rows, claims):
        print("\n".join(markdown(list(table))), end="\n\n")
    print(f"{args.out}: table.csv, claims.json and the figure")
