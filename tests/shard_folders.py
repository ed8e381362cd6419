"""Small folders of shards for tests, and what is asked of them."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from PIL import Image

import augment.shards.dataset
from augment import Mixing, Plan, Planner, Sampling, Synthesizer, UserError
from augment.core.schema import write
from augment.shards.dataset import Sample, encode, open_shards, verify_shard, write_shard
from augment.shards.format import Output, shard_path
from augment.shards.write import ShardJob

CLASSES = ["ant", "bee"]
ODD = "a#b ?%20 {0..3} ü"
quickly = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def picture(key: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    """Values that 8 bits can hold, and smooth enough for JPEG."""
    rows = torch.arange(size).reshape(1, size, 1) * 3.0
    columns = torch.arange(size) * torch.arange(1.0, channels + 1).reshape(-1, 1, 1)
    return (40.0 + 9 * key + rows + columns) / 255


def plan(key: int) -> Plan:
    name = CLASSES[key % 2]
    return Plan(key % 2, name, (f"{name}/ü.png", "b.png"), (0.25, 0.75), 0.0, 0, 0, key)


def sample(key: int, extension: str = "png", channels: int = 3, size: int = 8) -> Sample:
    image = encode(picture(key, channels, size), extension)
    return Sample(key, image, key % 2, {"plan": asdict(plan(key)), "steps": 4})


def fill(
    folder: Path,
    counts=(3, 2),
    extension: str = "png",
    channels: int = 3,
    size: int = 8,
    classes=CLASSES,
    about=None,
):
    """Write a folder of shards, with a number of samples for each."""
    folder.mkdir(parents=True)
    facts = {"schema": 1, "classes": classes, "shards": len(counts), "extension": extension}
    (folder / "synthesis.json").write_text(json.dumps(facts))
    first = 0
    for number, count in enumerate(counts):
        samples = [sample(key, extension, channels, size) for key in range(first, first + count)]
        samples = [one._replace(about=about or one.about) for one in samples]
        write_shard(shard_path(folder, number), samples, extension, dropped={"dark": {"ant": 2}})
        first += count
    return folder


def tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def same(image: Image.Image, expected: torch.Tensor) -> bool:
    """Whether a PIL image of another reader has the pixels that ours gave."""
    return image.tobytes() == augment.shards.dataset.to_pil(expected).convert(image.mode).tobytes()


def rewrite(path: Path, **changes: object) -> None:
    """Change a shard's record."""
    record = path.with_suffix(".json")
    facts = json.loads(record.read_bytes()) | changes
    write(record, {key: facts[key] for key in facts if key != "digest"}, indent=None)


def sane(folder: Path, extension: str = "png") -> None:
    """All that can be asked of a folder gives an answer or a `UserError`, nothing else."""
    with suppress(UserError):
        opened = open_shards(folder, complete=False)
        for index in range(len(opened)):
            for ask in (opened.__getitem__, opened.about, opened.plan, opened.metadata):
                with suppress(UserError):
                    ask(index)
    reason = verify_shard(shard_path(folder, 0), len(CLASSES), extension)
    assert reason is None or reason.strip()


def expected(folder: Path) -> list[tuple[torch.Tensor, int]]:
    return list(open_shards(folder))


def put(path: Path, content: bytes, **changes: object) -> None:
    """Replace a tar and make its record fit."""
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(path, bytes=len(content), sha256=digest, **changes)


def small_job(
    root: Path, bank, backbone, out: str = "out", alpha: float = 1.0, source=None, **options
) -> ShardJob:
    """Return a job of 8 images a class in shards of 10."""
    sampling = Sampling(steps=2, batch_size=4)
    synthesizer = Synthesizer(backbone, bank, sampling=sampling, source=source)
    planner = Planner(bank.members, Mixing(alpha=alpha, members=2, noise=0.3))
    options = {"shard_size": 10, "extension": "png"} | options
    job = {k: options.pop(k) for k in ("filters", "where") if k in options}
    return ShardJob(root / out, synthesizer, planner, 8, Output(**options), **job)
