"""Exported images to a dataset of the Hugging Face hub."""

import re
from pathlib import Path

from augment.core.errors import UserError
from augment.diffusion.checkpoints.hub import REPOSITORY, brief
from augment.shards.export import BEGUN

MAX_FILES = 10_000
"""Images above which a push writes parquet: the hub refuses larger folders."""


def check_name(name: str) -> None:
    """Refuse what is no name of a dataset on the hub.

    Raises:
        UserError: it is not ``owner/name``.
    """
    if not re.fullmatch(REPOSITORY, name):
        raise UserError(f"expected a dataset of the hub as owner/name, got {name!r}; name one")


def push_folder(out: str | Path, name: str) -> str:
    """Upload an export to a dataset of the hub; the same call again resumes.

    The dataset is private if it is new. Files that are there with the same content are skipped.

    Args:
        out: folder that `augment.shards.export.export_folder` wrote.
        name: of the dataset, owner/name.

    Returns:
        The address of the dataset.

    Raises:
        UserError: the hub does not take it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    check_name(name)
    api = HfApi(library_name="latent-augment")
    try:
        url = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=out,
            repo_type="dataset",
            commit_message="Synthetic images by latent-augment",
            ignore_patterns=[BEGUN, "*.tmp", ".cache/**"],
        )
    except Exception as error:  # of the client, of its HTTP library, or of the disk
        reason = getattr(error, "server_message", None) or brief(error)
        raise UserError(
            f"expected to write to the dataset {name} of the hub, got: {reason.rstrip('.')}; log "
            "in with 'hf auth login' if you are not, and run the same command again, which resumes"
        ) from None
    return str(url)
