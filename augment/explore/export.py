"""Export chosen images as a folder by class: PNG files, and ``metadata.jsonl`` with their plans.

The folder is one of those that `augment.shards.export.export_folder` writes, so training on it
still finds every held-out image that its images come from. Each export adds to it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from augment.bank.format import DIGITS
from augment.core.errors import UserError
from augment.core.files import in_use, locked, read_file, read_json, write_bytes, write_json
from augment.diffusion.checkpoints.adapter import adapted_to
from augment.explore.session import Choice, Explorer, settings
from augment.shards.dataset import encode
from augment.shards.export import METADATA, check_names
from augment.sources.folder import ORIGINS


def export(explorer: Explorer, choices: Sequence[Choice]) -> Path:
    """Write the images of choices to the explorer's folder ``out``, beside those already there.

    Returns:
        The folder.

    Raises:
        UserError: there is no folder, nothing was chosen, the folder holds something else or the
            images of another bank, or a class name can be no folder.
    """
    out, bank = explorer.out, explorer.bank
    if out is None or not choices:
        raise UserError(
            f"expected images to export and a folder for them, got {len(choices)} images and "
            f"{out or 'no folder'}; keep some, and start latent-augment explore with --out DIR"
        )
    check_names(bank.classes)
    own = {d[:DIGITS]: i for name in bank.classes for i, d in bank.digests(name).items()}
    origins = adapted_to(bank.fingerprint["backbone"]) | own
    with locked(out) as lock:
        lock.sweep()
        begun = (out / ORIGINS).exists()
        if in_use(out) if not begun else read_json(out / ORIGINS, "origins") != origins:
            raise UserError(
                f"expected {out} to be new, or exported to from this bank before, got a folder "
                "with something else; start latent-augment explore with another --out"
            )
        write_json(out / ORIGINS, origins)
        for name in bank.classes:
            (out / name).mkdir(exist_ok=True)
        known = (out / METADATA).exists()
        lines = read_file(out / METADATA, "a list of images").splitlines() if known else []
        for key, choice in enumerate(choices, len(lines)):
            facts = {
                "file_name": f"{choice.plan.class_name}/{key:08d}.png",
                "label": choice.plan.label,
                "class_name": choice.plan.class_name,
            }
            if prompt := explorer.prompt(choice):
                facts["prompt"] = prompt
            write_bytes(out / facts["file_name"], encode(explorer.image(choice), "png"))
            lines.append(json.dumps({**facts, **settings(choice), **facts}).encode())
        write_bytes(out / METADATA, b"\n".join([*lines, b""]))
    return out
