"""Finding a checkpoint: a folder, a repository of the hub, or one file of an original release.

Its kind is read first, from the index or the file's header, so that a wrong kind costs no
gigabytes.
"""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from augment.core.errors import UserError
from augment.diffusion.checkpoints.checkpoint import Checkpoint, read_index
from augment.diffusion.checkpoints.hub import (
    HUB,
    INDEX,
    REPOSITORY,
    brief,
    explained,
    local_folder,
)

_PARTS = {"sdxl": "conditioner.embedders.1.", "sd15": "cond_stage_model.transformer."}
"""Prefixes of the text encoders' tensors, by model."""

_SEVERAL = (
    ("double_blocks.0.img_mod.lin.weight", "FLUX.1 [schnell]", "black-forest-labs/FLUX.1-schnell"),
    ("double_stream_modulation_img.lin.weight", "FLUX.2", "flux2-klein"),
    ("cap_embedder.1.weight", "Z-Image", "z-image"),
)
"""Tensors of families whose models, few-step ones among them, have the same: family, example."""

_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
"""Prefixes of the text encoders' tensors in files of whole models."""

_WHOLE = (
    *("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"),
    "FluxPipeline",
)
"""Pipelines that diffusers loads from a file of a whole model; of others it reads the network."""


def find_checkpoint(
    source: str,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    config: str | Path | None = None,
) -> Checkpoint:
    """Find the checkpoint in a folder, file or hub repository.

    Args:
        source: a pipeline folder, a ``.safetensors`` file, a key of `HUB`, ``owner/name``, or a
            folder in a repository, ``owner/name/folder``.
        revision: branch, tag or commit on the hub.
        variant: of the weights' files, ``fp16`` for instance.
        local_files_only: take from the hub's cache alone.
        config: of a single file, a pipeline folder, a key of `HUB` or ``owner/name`` with configs
            and tokenizers, and of a file without text encoders with all weights but the network's;
            by default guessed from the file's tensors.

    Raises:
        UserError: nothing there, no network, or none of diffusers' checkpoints.
    """
    source, hub = HUB.get(source, source), (revision, variant, local_files_only)
    local = Path(source).is_dir() or Path(source).suffix == ".safetensors"
    if (local and revision) or (Path(source).suffix == ".safetensors" and variant):
        raise UserError(
            f"expected a revision of a repository on the hub, or a variant of a folder, got "
            f"{revision or variant!r} with {source}; leave it out"
        )
    if Path(source).suffix == ".safetensors":
        return _single_file(Path(source), config, local_files_only)
    if config is not None:
        raise UserError(
            f"expected a config for a single .safetensors file alone, got one with {source!r}; "
            "leave it out"
        )
    if Path(source).is_dir():
        return Checkpoint(source, _kind_of(Path(source) / INDEX), Path(source), None, *hub)
    match = re.fullmatch(rf"({REPOSITORY})(?:/(\w[\w.-]*))?", source)
    if not match:
        raise UserError(
            f"expected a backbone out of tiny, tiny-cifar, {', '.join(HUB)}, a pipeline folder, a "
            f".safetensors file or owner/name on the hub, got {source!r}; choose one of these"
        )
    from huggingface_hub import hf_hub_download

    repository, inside = match[1], match[2] or ""
    with explained(source):
        index = hf_hub_download(
            repository,
            INDEX,
            subfolder=inside or None,
            revision=revision,
            local_files_only=local_files_only,
        )
    return Checkpoint(source, _kind_of(Path(index)), None, None, *hub, inside)


def _kind_of(index: Path) -> str:
    """Return the pipeline class that a ``model_index.json`` names."""
    return read_index(index)["_class_name"]


def _single_file(path: Path, config: str | Path | None, local_files_only: bool) -> Checkpoint:
    """Describe a checkpoint of one file, with a folder of what it has not."""
    schedule = _schedule_of(path)
    config = str(config or guess_config(path))
    config = HUB.get(config, config)
    patterns = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]
    folder = local_folder(config, patterns, local_files_only)
    index = read_index(folder / INDEX)
    kind, keys = index["_class_name"], read_header(path)[1]
    whole = kind in _WHOLE and any(key.startswith(_TEXT) for key in keys)
    checkpoint = Checkpoint(
        str(path), kind, folder, path,
        local_files_only=local_files_only,
        alone="" if whole else "unet" if "unet" in index else "transformer",
        repository="" if Path(config).is_dir() else config,
    )  # fmt: skip
    scheduler = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    scheduler |= checkpoint.config("scheduler")
    for key, value in schedule.items():
        if scheduler[key] != value:
            raise UserError(
                f"expected a config with {key} {value}, as in {path}, got "
                f"{scheduler[key]} in {folder}; give config=, a folder whose scheduler says so too"
            )
    return checkpoint


def _schedule_of(path: Path) -> dict[str, str | bool]:
    """Read settings of a single file's noise schedule, by diffusers' names.

    Finetuned models have empty tensors (``v_pred``, ``ztsnr``) for them, or a header.
    """
    header, keys = read_header(path)
    with safe_open(path, framework="pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in keys}
    if quantised := sorted(kind for kind in kinds if kind.startswith(("F8", "F4", "I8", "U8"))):
        raise UserError(
            f"expected weights as they were trained, got quantised ones ({quantised[0]}) in "
            f"{path}; take the file of 16 bits"
        )
    for key in keys:
        if key.startswith("edm_"):
            raise UserError(
                f"expected a noise schedule of Stable Diffusion, got {path} with {key}, of EDM; "
                "take another checkpoint"
            )
    names = {"epsilon": "epsilon", "v": "v_prediction"}
    name = "v" if "v_pred" in keys else header.get("modelspec.prediction_type", "")
    settings: dict[str, str | bool] = {"prediction_type": names[name]} if name in names else {}
    return settings | ({"rescale_betas_zero_snr": True} if "ztsnr" in keys else {})


def read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Read a safetensors file's metadata, and its tensors' shapes by name."""
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
    """Find the key of `HUB` whose configs fit a file of the original format, by its header.

    Raises:
        UserError: an unreadable file, or one of no known model or of several.
    """
    net, shapes = "model.diffusion_model.", read_header(path)[1]
    keys = {key.removeprefix(net): shape for key, shape in shapes.items()}
    if keys.get("input_blocks.0.0.weight", [0, 0])[1] == 4:
        names = (n for n, start in _PARTS.items() if any(key.startswith(start) for key in keys))
        name = next(names, "")
        if name and _schedule_of(path).get("prediction_type", "epsilon") != "epsilon":
            raise UserError(
                f"expected a config with {path}, which says that it predicts v, got none; give "
                "config=, a folder of configs whose scheduler says so too"
            )
        if name:
            return name
        if any(key.startswith("cond_stage_model.model.") for key in keys):
            raise UserError(
                f"expected a config with the Stable Diffusion 2 file {path}, whose tensors do not "
                "show what it predicts, got none; give config='sd21' (768 pixels, v) or "
                "'sd21-base' (512, epsilon)"
            )
    if "joint_blocks.0.context_block.adaLN_modulation.1.bias" in keys:
        if "joint_blocks.37.x_block.mlp.fc1.weight" in keys:
            return "sd35-large"
        positions = keys.get("pos_embed", [0, 0])[1]
        return "sd35-medium" if positions == 147456 else "sd3"
    if "double_blocks.0.img_mod.lin.weight" in keys and "guidance_in.in_layer.weight" in keys:
        return "flux1-dev"
    for key, family, name in _SEVERAL:
        if key in keys:
            raise UserError(
                f"expected a config with the {family} file {path}, whose tensors do not show which "
                f"model it is, got none; give config={name!r}, or a folder or repository of yours"
            )
    raise UserError(
        "expected the weights of tiny or of a known text-to-image model, got "
        f"{path}, with {len(keys)} other tensors; give a text-to-image checkpoint, with config= "
        "if it is a network alone, and a LoRA as lora="
    )
