"""What all reproductions share: options, sizes, a cache of finished parts, records and RESULTS.md.

A script about one of the five works ends in `record`, which writes its table, and for every claim
of that work the intervals that decide it. With ``--write`` the record is kept in ``results/``,
figures go to ``docs/``, and the section of RESULTS.md between the marks is written anew from all
records. To do only that:

    python scripts/reproduce/claims.py

Other studies end in `conclude`, with claims that they decide themselves.
"""

import argparse
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save
from torch import Tensor
from works import CLAIMS, WORKS, Claim, Interval

from augment.core.files import write_bytes, write_json, write_table
from augment.report.evaluate import markdown

ROOT = Path(__file__).parents[2]
RECORDS = Path(__file__).parent / "results"
MARKS = "<!-- written by scripts/reproduce/claims.py -->", "<!-- end of what it wrote -->"
VERDICTS = ("holds", "does not hold", "within noise", "cannot be decided here")

sys.path.append(str(Path(__file__).parents[1]))  # for what other scripts have

_INTRODUCTION = """The claims are data (`scripts/reproduce/works.py`), each with the number and the
bounds that decide it. Brackets are 95 % intervals. A claim holds if all its intervals lie within
the bounds, does not hold if one lies outside, and is within noise otherwise. Unless a command says
otherwise, the backbone is `tiny` and images are of Fashion-MNIST's test split, which `tiny` never
saw. The bounds are ours; torch was 2.14.1."""
_T = TypeVar("_T")
_MADE: dict[Path, bool] = {}
"""Whether this run has made a finished part itself; otherwise its seconds are not those of all."""


def options(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every reproduction has."""
    parser = argparse.ArgumentParser(description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer samples: minutes on two cores")
    size.add_argument("--toy", action="store_true", help="hardly any samples: for tests")
    parser.add_argument("--backbone", default="tiny", help="as for latent-augment invert")
    parser.add_argument("--images", type=Path, help="folder of class folders; default embedded")
    parser.add_argument("--network", default="fashion", help="the judge, as for evaluate")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce") / name)
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    return parser


def sized(args: argparse.Namespace, toy: _T, quick: _T, full: _T) -> _T:
    """Choose by the size of the run."""
    return toy if args.toy else quick if args.quick else full


def once(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load tensors from a file, which is made first if it is missing."""
    _MADE.setdefault(path, not path.exists())
    if not path.exists():
        made = {key: value.cpu().contiguous() for key, value in make().items()}
        write_bytes(path, save(made))
    return load_file(path)


def record(
    args: argparse.Namespace,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[str, Mapping[str, Interval]],
    **figures: str,
) -> None:
    """Write a run's record, and print it.

    Args:
        args: the options.
        title: of the table, with its units.
        rows: the table.
        found: by claim the intervals that decide it, by name.
        figures: captions of PNG files in ``--out``, by their names without the suffix.
    """
    script, own = Path(sys.argv[0]).stem, Path(args.backbone).stem
    name = script if own == "tiny" else f"{script}-{own}"
    made = {
        "command": command(sys.argv),
        "backbone": own, "network": args.network, "machine": machine(),
        "core_seconds": round(time.process_time()) if all(_MADE.values()) else None,
        "title": title,
        "rows": [{k: v if isinstance(v, str) else float(f"{v:.4g}") for k, v in row.items()
                  if v is not None} for row in rows],
        "claims": {key: {name: [float(f"{min(max(x, -1e9), 1e9):.4g}") for x in interval]
                         for name, interval in found[key].items()} for key in found},
        "figures": figures,
    }  # fmt: skip
    columns = list(rows[0])
    write_table(args.out / "table.csv", [columns, *(list(row.values()) for row in rows)])
    write_json(args.out / "record.json", made)
    print("\n".join(markdown(rows)), end="\n\n")
    for key in found:
        print("\n".join(bullet(key, made["claims"])))
    if args.write:
        RECORDS.mkdir(exist_ok=True)
        write_json(RECORDS / f"{name}.json", made)
        for figure in figures:
            shutil.copy(args.out / f"{figure}.png", ROOT / "docs" / f"{figure}.png")
        write_results()


def command(argv: Sequence[str]) -> str:
    """Return the command of a run, without folders and what does not change its figures.

    >>> command(["a/walks.py", "--quick", "--write", "--out", "b", "--backbone", "c/d.safetensors"])
    'python scripts/reproduce/walks.py --quick --backbone d.safetensors'
    """
    words = [Path(word).name for word in argv]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    kept = [word for word in words[1:] if word != "--write"]
    return " ".join(["python", f"scripts/reproduce/{words[0]}", *kept])


def claim(claimed: str, here: str, verdict: bool | None) -> dict[str, str]:
    """Return a claim of another study: claimed, found, and whether it holds; None is noise."""
    word = {True: "holds", False: "does not hold", None: "within noise"}[verdict]
    return {"claimed": claimed, "here": here, "verdict": word}


def conclude(
    args: argparse.Namespace, rows: Sequence[dict[str, Any]], claims: Sequence[dict[str, str]]
) -> None:
    """Write ``table.csv`` and ``claims.json`` of another study, and print both."""
    columns = list(rows[0])
    write_table(args.out / "table.csv", [columns, *(list(row.values()) for row in rows)])
    settings = {key: str(value) for key, value in vars(args).items()}
    write_json(args.out / "claims.json", {"settings": settings, "claims": list(claims)})
    for table in (rows, claims):
        print("\n".join(markdown(list(table))), end="\n\n")


def machine() -> str:
    """Name the processor and the versions that figures depend on."""
    import os

    import diffusers
    import torch

    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "a CPU")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{os.cpu_count()} × {model}, {versions}"


def read_records() -> dict[str, dict[str, Any]]:
    """Read the records of the last runs by script, in the order of the claims.

    Those of another backbone than `tiny` come first, so that `tiny` decides where both do.
    """
    scripts = dict.fromkeys(claim.script for claim in CLAIMS.values())
    paths = [
        path
        for name in scripts
        for path in (*sorted(RECORDS.glob(f"{name}-*.json")), RECORDS / f"{name}.json")
    ]
    return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}


def intervals(key: str, claims: Mapping[str, Any]) -> dict[str, Interval]:
    """Return what was found for a claim."""
    return {name: Interval(*values) for name, values in claims.get(key, {}).items()}


def bullet(key: str, claims: Mapping[str, Any]) -> list[str]:
    """Return the lines of a claim: verdict, wording, what decides, and what was found."""
    claim, found = CLAIMS[key], intervals(key, claims)
    verdict = claim.verdict(found)
    text = f"- **{verdict}** ({claim.where}): {claim.wording}."
    if verdict == "cannot be decided here":
        text += f" {reason(claim)[0].upper()}{reason(claim)[1:]}."
    else:
        here = "; ".join(f"{name}: {x}" if name else f"{x}" for name, x in found.items())
        text += f" *{claim.rule}*. Found: {here}."
        text += f" {claim.note}" if claim.note and verdict != "holds" else ""
    return textwrap.wrap(text, 98, subsequent_indent="  ", break_on_hyphens=False)


def reason(claim: Claim) -> str:
    """Say why a claim is not decided."""
    return claim.undecided or f"`{claim.script}.py` has not been run here since it changed"


def section() -> list[str]:
    """Return the lines of the five works' section of RESULTS.md."""
    records = read_records()
    found = {key: value for record in records.values() for key, value in record["claims"].items()}
    verdicts = {key: claim.verdict(intervals(key, found)) for key, claim in CLAIMS.items()}
    lines = ["## The five works: what holds, what does not, and why: `make reproduce`", ""]
    rows = [
        {"work": WORKS[work].split(",")[0]}
        | {v: sum(CLAIMS[k].work == work and verdicts[k] == v for k in CLAIMS) for v in VERDICTS}
        for work in WORKS
    ]
    lines += [*markdown(rows), ""]
    minutes = sum(record["core_seconds"] or 0 for record in records.values()) / 60
    lines += textwrap.wrap(f"{_INTRODUCTION} All runs took {minutes:.0f} minutes of a core.", 98)
    for work, title in WORKS.items():
        lines += ["", f"### {title.split(',')[0]}", "", *textwrap.wrap(title, 98), ""]
        for key in (key for key, claim in CLAIMS.items() if claim.work == work):
            lines += bullet(key, found)
        own = [claim.script for claim in CLAIMS.values() if claim.work == work]
        for script in dict.fromkeys(own):
            for name in sorted(records):
                if name.split("-")[0] == script and first_work(script) == work:
                    lines += ["", *table_of(records[name])]
    return lines


def first_work(script: str) -> str:
    """Return the work whose section has a script's table."""
    return next(claim.work for claim in CLAIMS.values() if claim.script == script)


def table_of(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of a record's table and figures."""
    text = f"`{record['command']}`: {record['title']} ({record['machine']}{spent(record)})"
    lines = [*textwrap.wrap(text, 98, break_on_hyphens=False), "", *markdown(record["rows"])]
    figures = [f"![{caption}](docs/{name}.png)" for name, caption in record["figures"].items()]
    return [*lines, *([""] if figures else []), *figures]


def spent(record: Mapping[str, Any]) -> str:
    """Say how long a run took, if it made all of its parts itself."""
    return f"; {record['core_seconds']} s of a core." if record["core_seconds"] else "."


def rewritten(text: str) -> str:
    """Return RESULTS.md's text with the section between the marks written anew."""
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return "\n".join([f"{before}{MARKS[0]}", "", *section(), "", f"{MARKS[1]}{after}"])


def write_results() -> None:
    """Write the section of RESULTS.md from the records."""
    path = ROOT / "RESULTS.md"
    write_bytes(path, rewritten(path.read_text("utf-8")).encode())


if __name__ == "__main__":
    write_results()
