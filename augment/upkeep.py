"""Looking after banks and shards: what is in them, is it whole, and taking banks apart or together.

Nothing here needs a backbone. Damage is found by the digests that every commit record holds, and
what is damaged is taken out by removing its record: then the command that made it makes it again.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm

from augment.bank import LatentBank
from augment.chunks import Chunk
from augment.errors import UserError
from augment.files import TEMPORARY, check_folder, fits, locked, sha256, write_bytes, write_json
from augment.records import (
    check_file,
    file_of,
    read_manifest,
    read_record,
    require_same_making,
    stems,
)
from augment.shards import read_settings, read_sidecar, shard_path, verify_shard


class Finding(NamedTuple):
    """Something that is not as it should be.

    Attributes:
        what: in one line.
        record: the commit record to remove so that it is made again; None if that would not help.
    """

    what: str
    record: Path | None = None


def verify(path: str | Path, images: str | Path | None = None) -> list[Finding]:
    """Compare every file of a bank or of shards with what was recorded when it was written.

    Args:
        path: the folder.
        images: of a bank, the folder of images, to be compared too.

    Raises:
        UserError: there is neither a bank nor shards.
    """
    path = Path(path)
    if images is not None and not Path(images).is_dir():
        raise UserError(f"expected the folder of images at {images}, got none; check the path")
    if (path / "synthesis.json").exists():
        return list(shard_findings(path))
    return list(bank_findings(path, None if images is None else Path(images)))


def discard(findings: Sequence[Finding]) -> None:
    """Remove the records of what is damaged, so that the command that made it makes it again."""
    for finding in findings:
        if finding.record is not None:
            finding.record.unlink(missing_ok=True)


def bank_findings(path: Path, images: Path | None) -> Iterator[Finding]:
    """What is wrong with a bank."""
    manifest = read_manifest(path)
    expected = {path / "manifest.json", path / "rejects.jsonl"}
    chunks = [chunk for known in manifest["classes"] for chunk in stems(path, known)]
    for stem, plan in tqdm(chunks, "verify", unit="chunk", delay=2, leave=False):
        record_path = stem.with_suffix(".json")
        expected |= {record_path, stem.parent}
        try:
            record = read_record(stem, plan)
        except UserError as error:
            yield Finding(str(error), record_path)
            continue
        if record is None:
            yield Finding(f"{stem.relative_to(path)}: not made yet")
            continue
        for kind, known in record["files"].items():
            file = file_of(stem, kind)
            expected.add(file)
            try:
                check_file(file, known)
            except OSError as error:
                yield Finding(f"{file.relative_to(path)}: {error.strerror or error}", record_path)
        yield from image_findings(images, record)
    for file in sorted(path.rglob("*")):
        if file not in expected:
            yield Finding(f"{file.relative_to(path)}: not of this bank")


def image_findings(images: Path | None, record: dict[str, Any]) -> Iterator[Finding]:
    """Which images of a chunk are no longer what they were."""
    if images is None:
        return
    for image in record["images"]:
        try:
            same = sha256((images / image["id"]).read_bytes()) == image["sha256"]
        except OSError as error:
            yield Finding(f"image {image['id']}: {error.strerror}")
            continue
        if not same:
            yield Finding(f"image {image['id']}: changed since it was inverted")


def shard_findings(path: Path) -> Iterator[Finding]:
    """What is wrong with a folder of shards."""
    settings = read_settings(path)
    expected = {path / "synthesis.json"}
    for number in tqdm(range(settings["shards"]), "verify", unit="shard", delay=2, leave=False):
        shard = shard_path(path, number)
        record = shard.with_suffix(".json")
        expected |= {shard, record}
        if not record.exists():
            yield Finding(f"{shard.name}: not made yet")
            continue
        try:
            wrong = verify_shard(shard, len(settings["classes"]), settings["extension"])
        except UserError as error:
            wrong = str(error)
        if wrong:
            yield Finding(f"{shard.name}: {wrong}", record)
    for file in sorted(path.rglob("*")):
        if file not in expected:
            yield Finding(f"{file.relative_to(path)}: not of these shards")


def inspect(path: str | Path) -> str:
    """What a bank or a folder of shards holds, in a few lines.

    Raises:
        UserError: there is neither.
    """
    path = Path(path)
    return inspect_shards(path) if (path / "synthesis.json").exists() else inspect_bank(path)


def inspect_bank(path: Path) -> str:
    """What a bank holds, finished or not."""
    manifest = read_manifest(path)
    made = {known["name"]: 0 for known in manifest["classes"]}
    planned, size, rejects = 0, 0, 0
    means: dict[str, list[float]] = {"norm": [], "error": []}
    for known in manifest["classes"]:
        for stem, chunk in stems(path, known):
            planned += len(chunk["ids"])
            record = read_record(stem, chunk)
            if record is None:
                continue
            count = len(record["images"])
            made[known["name"]] += count
            rejects += len(record["rejects"])
            size += sum(file["bytes"] for file in record["files"].values())
            for key in means.keys() & record["statistics"].keys():
                means[key] += [record["statistics"][key]] * count
    prints, least, most = manifest["fingerprint"], min(made, key=made.get), max(made, key=made.get)  # type: ignore[arg-type]
    lines = [
        f"bank {path}: {sum(made.values())} of {planned} latents of {len(made)} classes, "
        f"{made[least]} ({least}) to {made[most]} ({most}) each; {rejects} images left out; "
        f"{size:,} bytes"
    ]
    for name, fields in (*prints.items(), ("made with", manifest["made_with"])):
        told = (
            fields if isinstance(fields, str) else ", ".join(f"{k} {v}" for k, v in fields.items())
        )
        lines.append(f"{name}: {told}")
    lines.append(f"images: {manifest['source']}")
    if means["norm"]:
        lines.append(f"norm / √D {fmean(means['norm']):.3f} on average")
    if means["error"]:
        lines.append(f"sampled back, images are at {psnr(fmean(means['error'])):.1f} dB (PSNR)")
    return "\n".join(lines)


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio, in dB, of a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(error, 1e-12))


def inspect_shards(path: Path) -> str:
    """What a folder of shards holds, finished or not, and what filters refused."""
    settings = read_settings(path)
    tally = count_shards(path)
    lines = [
        f"shards {path}: {tally.shards} of {settings['shards']}, {tally.written} of "
        f"{tally.wanted} images of {len(settings['classes'])} classes, {tally.bytes:,} bytes"
    ]
    return "\n".join([*lines, *map(str, tally.refused_lines())])


@dataclass
class Tally:
    """What the records of shards say.

    Attributes:
        shards: how many are there.
        written, wanted: images in them, and images that were to be.
        bytes: of the tars.
        refused: by filter and class, how many candidates it refused.
    """

    shards: int = 0
    written: int = 0
    wanted: int = 0
    bytes: int = 0
    refused: dict[str, Counter[str]] = field(default_factory=dict)

    def refused_lines(self) -> list[str]:
        """A line a filter, with the classes it refused most of."""
        return [
            f"filter {name} refused {counts.total()} candidates"
            + "".join(f", {label} {count}" for label, count in counts.most_common(5))
            for name, counts in self.refused.items()
        ]


def count_shards(path: Path) -> Tally:
    """Add up the records of the shards that are there.

    Raises:
        UserError: one is damaged.
    """
    settings, tally = read_settings(path), Tally()
    for number in range(settings["shards"]):
        shard = shard_path(path, number)
        if not shard.with_suffix(".json").exists():
            continue
        record = read_sidecar(shard, len(settings["classes"]))
        if not fits(record, {"wanted": int, "dropped": dict}) or not all(
            isinstance(counts, dict) and all(fits(count, int) for count in counts.values())
            for counts in record["dropped"].values()
        ):
            raise UserError(
                f"expected the record of {shard} as it was written, got another; see "
                "latent-augment verify"
            )
        tally.shards += 1
        tally.written += len(record["samples"])
        tally.wanted += record["wanted"]
        tally.bytes += record["bytes"]
        for name, counts in record["dropped"].items():
            tally.refused.setdefault(name, Counter()).update(counts)
    return tally


def merge(banks: Sequence[str | Path], out: str | Path) -> LatentBank:
    """One bank of the images of several, of the same settings; classes go by their names.

    Raises:
        BankMismatch: their settings differ.
        UserError: an image or a prompt differs, a bank is incomplete or damaged, or ``out`` is in
            use.
    """
    return assemble([(LatentBank.open(bank), None) for bank in banks], Path(out))


def split(bank: str | Path, classes: Sequence[str], out: str | Path) -> LatentBank:
    """A bank of some classes of another, in the order that they are named in.

    Raises:
        UserError: no such class, the bank is incomplete or damaged, or ``out`` is in use.
    """
    return assemble([(LatentBank.open(bank), list(classes))], Path(out))


def assemble(parts: list[tuple[LatentBank, list[str] | None]], out: Path) -> LatentBank:
    """Copy classes of banks to a new one; its manifest is written last."""
    check_folder(out)
    if not parts or any(wanted == [] for _, wanted in parts):
        raise UserError("expected at least one bank and one class, got none; name them")
    first = parts[0][0]
    classes: dict[str, dict[str, Any]] = {}
    homes: dict[str, Path] = {}
    copies: list[tuple[Chunk, Path]] = []
    unit = 0
    for bank, wanted in parts:
        require_same_making(bank.path, bank.manifest, first.manifest)
        names = list(bank.classes) if wanted is None else wanted
        for name in dict.fromkeys(names):
            prompt = bank.prompt(name)
            new = {"name": name, "folder": f"{len(classes):04d}", "prompt": prompt, "chunks": []}
            known = classes.setdefault(name, new)
            if known["prompt"] != prompt:
                raise UserError(
                    f"expected one prompt for class {name!r}, got {known['prompt']!r} and "
                    f"{prompt!r}; invert one of the banks again"
                )
            for chunk in bank.chunks[name]:
                twice = next((i for i in chunk.ids if i in homes), None)
                if twice is not None:
                    raise UserError(
                        f"expected different images in {homes[twice]} and {bank.path}, got "
                        f"{twice} in both; invert one of them without it"
                    )
                homes |= dict.fromkeys(chunk.ids, bank.path)
                number = len(known["chunks"])
                known["chunks"].append({"number": number, "unit": unit, "ids": chunk.ids})
                copies.append((chunk, out / known["folder"] / f"chunk-{number:04d}"))
                unit += 1
    with locked(out) as lock:
        parts_ = [path for path in out.iterdir() if not TEMPORARY.fullmatch(path.name)]
        if any(not path.name.isdigit() for path in parts_):  # else a copy that was interrupted
            raise UserError(
                f"expected {out} to be new or empty, got a folder in use; use a new one"
            )
        for chunk, stem in tqdm(copies, "copy", unit="chunk", delay=2, leave=False):
            copy(chunk, stem)
        write_json(out / "manifest.json", {**first.manifest, "classes": list(classes.values())})
        lock.sweep()
    return LatentBank.open(out)


def copy(chunk: Chunk, stem: Path) -> None:
    """Copy a chunk, and its record last; what was left out of it stays behind.

    Raises:
        UserError: it is damaged.
    """
    record = chunk.record
    for kind, known in record["files"].items():
        try:
            check_file(chunk.file(kind), known)
        except OSError as error:
            raise UserError(
                f"expected {chunk.file(kind)} as it was written, got {error.strerror or error}; "
                "see latent-augment verify"
            ) from None
        write_bytes(file_of(stem, kind), chunk.file(kind).read_bytes())
    write_json(stem.with_suffix(".json"), {**record, "rejects": []})
