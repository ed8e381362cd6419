"""Fixtures of several test files: small images, an exact backbone, banks."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from augment import Mixing, Planner, Sampling, SyntheticDataset
from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.cli import main
from augment.core.schema import write
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.sources import Folder

COUNTS = {"ant": 3, "bee": 4, "cat": 1}


def paint(root: Path, counts: dict[str, int] = COUNTS, size: int = 8, seed: int = 0) -> Path:
    """Write image folders of grey noise, ``root/class/0.png`` and so on."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def settings_of(options: dict[str, Any]) -> tuple[Mixing, Sampling, dict[str, Any]]:
    """Split options into what is mixed, how it is sampled, and the rest."""
    mixing, sampling = (
        kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})
        for kind in (Mixing, Sampling)
    )
    known = {*vars(mixing), *vars(sampling)}
    return mixing, sampling, {key: value for key, value in options.items() if key not in known}


def planner_with(images: Any, **options: Any) -> Planner:
    """A planner by flat options."""
    mixing, _, rest = settings_of(options)
    return Planner(images, mixing, **rest)


def dataset_with(bank: Any, backbone: Backbone, **options: Any) -> SyntheticDataset:
    """A synthetic dataset by flat options."""
    mixing, sampling, rest = settings_of(options)
    return SyntheticDataset(bank, backbone, mixing, sampling, **rest)


def call(monkeypatch, capsys, *args):
    """Return exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["latent-augment", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def amend(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record, and write it with the right digest."""
    record = json.loads(path.read_bytes())
    record.pop("digest")
    change(record)
    write(path, record)


class Cut(Exception):
    """What ends a training early."""


def cut_short(monkeypatch: pytest.MonkeyPatch, module: type, at: int) -> list[int]:
    """Raise `Cut` at a batch of a module that adapts a backbone; return the batches that it gets.

    There is a checkpoint after each step.
    """
    step, seen = module.training_step, []

    def training_step(self: Any, batch: Any, number: int) -> Any:
        seen.append(number)
        if len(seen) == at:
            raise Cut
        return step(self, batch, number)

    monkeypatch.setattr("augment.training.adapt.run.SAVE_STEPS", 1)
    monkeypatch.setattr(module, "training_step", training_step)
    return seen


def snapshot(root: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes, and every empty folder."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    return load_backbone("tiny", device="cpu")


@pytest.fixture(scope="session")
def gaussian() -> GaussianBackbone:
    return GaussianBackbone(mean=0.1, latent_shape=(1, 8, 8))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def bank(
    tmp_path_factory: pytest.TempPathFactory, gaussian: GaussianBackbone, pictures: Path
) -> LatentBank:
    """Fill a bank by the exact backbone; tests that damage a bank fill one of their own."""
    return fill_bank(tmp_path_factory.mktemp("bank"), gaussian, Folder(pictures), steps=4)
