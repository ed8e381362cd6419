"""The environment of a benchmark, and the Markdown of its rows."""

import argparse
import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
VERSIONS = (
    *("torch", "torchvision", "diffusers", "pytorch-lightning", "webdataset"),
    *("safetensors", "numpy", "pillow"),
)
SIGNS = {
    "speed": "≥ {:g} ×",
    "time": "≤ {:g} × the time",
    "extra": "≤ {:g} s more",
    "seconds": "≤ {:g} s",
}
"""How a bar of each measure is printed."""


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Return what times depend on: machine, versions, commit, command."""
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "none"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join(["python", "scripts/benchmark.py", *args.argv]),
        "quick": args.quick,
        "commit": commit(),
        "cpu": processor(),
        "cores": cores(),
        "threads": args.threads,
        "gpu": device,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
    }


def processor() -> str:
    """Return the model of the CPU, or the kind of machine."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Count the cores that this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def commit() -> str:
    """Return the commit, marked if the tree has changes; empty outside a repository."""
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def digits(value: float) -> str:
    """Format a number with three digits, or as a whole number."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def brief(times: dict[str, Any]) -> str:
    """Format the median and, of several times, the quartiles, in a fitting unit."""
    sizes = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit = next((unit for unit, size in sizes.items() if times["median"] >= size), "µs")
    median, low, high = (digits(times[key] / sizes[unit]) for key in ("median", "low", "high"))
    several = f"({low}–{high}) " if len(times["rounds"]) > 1 else ""
    return f"{median} {several}{unit}"


def verdict(bar: dict[str, Any] | None) -> str:
    """Format what was promised, what was found, and whether it holds."""
    if bar is None:
        return ""
    promised = SIGNS[bar["measure"]].format(bar["limit"])
    return f"{promised}: {digits(bar['found'])}, {'held' if bar['held'] else '**not held**'}"


def heading(suite: str, where: dict[str, Any]) -> list[str]:
    """Return the lines above a table: the command, and what its times depend on."""
    facts = [f"{key} {value}" for key, value in where.items() if key not in ("command", "quick")]
    lines = [f"## {suite.capitalize()}: `{where['command']}`", "", f"{', '.join(facts)}.", ""]
    if where["quick"]:
        lines += ["**Quick: small sizes, few rounds. It goes through; nothing was measured.**", ""]
    return lines


def comparisons(rows: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown lines of the records of `benchmarks.paired.timed`."""
    lines = [
        "Times are of one unit: median (quartiles). The ratio is the median of the rounds'.",
        "",
        "| what | unit | threads | ours | theirs | × as fast | promised | quality | baseline |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [row["name"], row["unit"], str(row["threads"]), brief(row["ours"])]
        cells += [brief(row["theirs"]), digits(row["ratio"]["median"]), verdict(row["bar"])]
        cells += [row["quality"], row["baseline"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
