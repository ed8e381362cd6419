"""Banks and shards kept: ``inspect``, ``verify``, ``merge``, ``split``, ``export``."""

from contextlib import nullcontext
from pathlib import Path

from augment.commands.common import Record, listed, tell_of_bank
from augment.core.errors import UserError
from augment.sources import Source


def inspect(path: str) -> Record:
    """Tell what a bank or a folder of shards holds.

    Args:
        path: the folder.
    """
    from augment.shards import verify as shards_verify

    told = shards_verify.inspect(path)
    print(told)
    return {"path": path, "told": told.splitlines()}


def verify(
    path: str,
    images: Source | str | None = None,
    discard: bool = False,
    repair: bool = False,
) -> Record:
    """Compare every file of a bank or of shards with what was recorded when it was written.

    Args:
        path: the folder.
        images: of a bank, its images, to be compared too: a folder, or a source as for invert.
        discard: take out what is damaged; the command that made it then makes it again.
        repair: make a lost or damaged manifest.json, or synthesis.json, again from the records.
    """
    from augment.bank import verify as bank_verify
    from augment.core.files import locked
    from augment.shards import verify as shards_verify

    with locked(Path(path)) if discard or repair else nullcontext():  # not beside a job
        if repair:
            print(shards_verify.repair(Path(path)))
        findings = shards_verify.verify(path, images)
        for finding in findings:
            print(finding.what)
        if discard:
            bank_verify.discard(findings)
    if findings:
        damaged = sum(finding.record is not None for finding in findings)
        after = "taken out; run the command that made it again" if discard else "as above"
        raise UserError(
            f"expected {path} as it was written, got {len(findings)} findings, {damaged} of them "
            f"damage that can be made again, {after}"
            + ("" if discard or not damaged else "; take it out with --discard")
        )
    print(f"{path}: every file is as it was written")
    return {"path": path, "findings": 0}


def merge(banks: str, out: str) -> Record:
    """Make one bank of several of the same settings.

    Args:
        banks: their folders, with commas between.
        out: folder of the new one.
    """
    from augment.bank import merge as bank_merge

    folders = listed(banks, lambda place: Path(place).exists())
    return tell_of_bank(bank_merge.merge(folders, out).path)


def split(bank: str, classes: str, out: str) -> Record:
    """Make a bank of some classes of another.

    Args:
        bank: its folder.
        classes: their names, with commas between, in the order of the new labels; a name may hold
            a comma.
        out: folder of the new one.
    """
    from augment.bank import merge as bank_merge
    from augment.bank.bank import LatentBank
    from augment.sources.prompts import nfc

    known = {nfc(name): name for name in LatentBank.open(bank).classes}
    names = listed(nfc(classes), known.__contains__)
    return tell_of_bank(bank_merge.split(bank, [known.get(n, n) for n in names], out).path)


def export(shards: str, out: str) -> Record:
    """Write the images of shards as a folder by class, with a metadata.jsonl.

    Args:
        shards: their folder.
        out: the new folder: out/class/00000000.jpg.
    """
    from augment.shards.export import export_folder

    export_folder(shards, out)
    print(f"{out}: written")
    return {"folder": out}
