"""Diffusers checkpoints: their parts, their process and their digest.

A checkpoint is a pipeline folder with a ``model_index.json``, here or in a repository of the
Hugging Face hub, or one ``.safetensors`` file with the names of the original releases, of a whole
model or of its network alone; see `augment.diffusion.checkpoints.find`. Weights are read from
safetensors alone, which cannot run code as pickles can, and no code comes from the hub.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from augment.core.errors import UserError
from augment.core.files import read_json
from augment.diffusion.checkpoints.hub import (
    INDEX,
    damaged,
    explained,
    local_folder,
    missing,
    quiet,
)
from augment.diffusion.process import Flow, Process, VariancePreserving

_NETWORKS = {
    "unet": ("UNet2DConditionModel",),
    "transformer": (
        *("SD3Transformer2DModel", "DiTTransformer2DModel", "Transformer2DModel"),
        *("SiTTransformer2DModel", "LightningDiTTransformer2DModel", "ZImageTransformer2DModel"),
        *("Flux2Transformer2DModel", "FluxTransformer2DModel"),
    ),
    "vae": ("AutoencoderKL", "AutoencoderKLFlux2"),
    "text_encoder": (
        *("CLIPTextModel", "CLIPTextModelWithProjection", "Qwen3Model", "Qwen3ForCausalLM"),
    ),
    "text_encoder_2": ("CLIPTextModelWithProjection", "T5EncoderModel"),
    "text_encoder_3": ("T5EncoderModel",),
}
"""The parts of a pipeline with weights that are used, and their allowed classes."""

_OTHERS = {
    "tokenizer": r"(CLIP|Qwen2)Tokenizer(Fast)?",
    "tokenizer_2": r"(CLIP|T5)Tokenizer(Fast)?",
    "tokenizer_3": r"T5Tokenizer(Fast)?",
    "scheduler": r"\w+Scheduler",
}
"""The parts without weights, and patterns of their classes."""

_OWN = ("SiTPipeline", "LightningDiTPipeline")
"""Pipelines that diffusers does not have."""

_FOREIGN = {
    "SiTTransformer2DModel": "transformer_sit",
    "SiTFlowMatchScheduler": "scheduling_flow_match_sit",
    "LightningDiTTransformer2DModel": "transformer_lightningdit",
    "LightningDiTFlowMatchScheduler": "scheduling_flow_match_lightningdit",
}
"""Their parts' classes, by the module beside the weights, which is neither fetched nor run."""

MAX_NUMBER = 100_000
"""Maximum of the numbers in a config, but for those of `_UNBOUNDED`."""

_UNBOUNDED = ("vocab_size", "_id", "_ids", "rope_theta")
"""Ends of the names of settings that may be larger, and allocate no more for it."""

_MAX_WHOLE = 4096
_ROWS = 16
"""The digest is of this number of rows of tensors with more than `_MAX_WHOLE` values."""

Config = dict[str, Any]
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # by diffusers' names
_USUAL_FLOW = {
    **{"use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None},
    "num_train_timesteps": 1000,
}
_USUAL_BETAS = {"timestep_type": "discrete", "use_flow_sigmas": False, "trained_betas": None}
"""Settings of schedulers' configs whose other values change the process."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and not yet loaded.

    Its methods raise `UserError` for what is missing, damaged, pickled, quantised or not allowed.

    Attributes:
        source: the user's name of it.
        kind: name of its pipeline class in diffusers.
        folder: of its parts and configs; None as long as they are on the hub.
        file: with all weights, instead of the folder's.
        alone: the part that is all that the file has, if so; other weights are the folder's.
        repository: that the folder of a single file is from, if it is from the hub.
        inside: folder of the repository that it is in, if it is not the repository's own.
        revision, variant, local_files_only: see `augment.diffusion.checkpoints.find`.
    """

    source: str
    kind: str
    folder: Path | None = None
    file: Path | None = None
    revision: str | None = None
    variant: str | None = None
    local_files_only: bool = False
    inside: str = ""
    alone: str = ""
    repository: str = ""

    def fetch(self, absent: Sequence[str]) -> "Checkpoint":
        """Download the folder, without the ``absent`` parts, if it is on the hub."""
        if self.alone and self.repository:
            absent = [*absent, self.alone]
        elif self.folder:
            return self
        if self.inside or self.kind in _OWN:
            repository = self.source.removesuffix(f"/{self.inside}")
            place = f"{self.inside}/" if self.inside else ""
            kinds = ("*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")
            patterns = [place + kind for kind in kinds]
            folder = local_folder(repository, patterns, self.local_files_only, self.revision)
            return replace(self, folder=folder / self.inside)._whole(absent)
        from diffusers import DiffusionPipeline
        from huggingface_hub import constants

        source = self.repository or self.source
        with explained(source):
            folder = DiffusionPipeline.download(
                source,
                revision=self.revision,
                variant=self.variant,
                # else diffusers asks the hub all the same, and hides what is missing
                local_files_only=self.local_files_only or constants.HF_HUB_OFFLINE,
                use_safetensors=True,
                **dict.fromkeys(absent),
            )
        return replace(self, folder=Path(folder))._whole(absent)

    def _whole(self, absent: Sequence[str]) -> "Checkpoint":
        """Return the checkpoint; refuse a cache without some parts, which was not filled now."""
        from huggingface_hub import constants

        for part in self.parts(absent):
            found = [path.name for path in (self.folder or Path()).joinpath(part).glob("*")]
            weights = any(".safetensors" in name for name in found)
            if not ("config.json" in found and weights) and (
                self.local_files_only or constants.HF_HUB_OFFLINE
            ):
                raise missing(self.repository or self.source, some=True)
        return self

    def parts(self, absent: Sequence[str]) -> list[str]:
        """Return the parts with weights that the fetched index names, without the ``absent``.

        Only the allowed classes may be named: nothing is imported because an index names it.
        """
        index = read_index((self.folder or Path()) / INDEX)
        known = {part: "|".join(names) for part, names in _NETWORKS.items()} | _OTHERS
        named = {
            part: entry
            for part, entry in index.items()
            if part in known.keys() - {*absent} and entry not in (None, [None, None])
        }
        for part, entry in named.items():
            library = "transformers" if part.startswith(("text", "token")) else "diffusers"
            names = entry if isinstance(entry, list) and len(entry) == 2 else ("", "")
            homes = {library, _FOREIGN.get(str(names[1])) if self.kind in _OWN else library}
            if names[0] not in homes or not re.fullmatch(known[part], str(names[1])):
                raise UserError(
                    f"expected {part} of {self.source} to be {known[part]} of {library}, got "
                    f"{entry} in {INDEX}; take another checkpoint"
                )
        return [part for part in _NETWORKS if part in named]

    def _variants(self, part: str) -> dict[str | None, list[list[Path]]]:
        """Find the sets of safetensors files that one part could be loaded from, by variant."""
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        plain = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors")
        index = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors(?:\.(\w+))?\.index(?:\.(\w+))?\.json")
        variants: dict[str | None, list[list[Path]]] = {}
        for path in sorted((self.folder or Path()).joinpath(part).glob("*")):
            if match := plain.fullmatch(path.name):
                variants.setdefault(match[1], []).append([path])
            elif match := index.fullmatch(path.name):
                name = match[1] or match[2] or match[3]
                variants.setdefault(name, []).append(_shards(path))
        return variants

    def weights(self, part: str) -> list[Path]:
        """Return the files to load a part from: the variant's if it has them, else plain."""
        variants, folder = self._variants(part), (self.folder or Path()) / part
        sets = variants.get(self.variant) or variants.get(None, [])
        if len(sets) > 1:
            names = ", ".join(path.name for path in sets[0])
            raise UserError(
                f"expected one set of weights in {folder}, got {names} and an index of others; "
                "remove one of the two"
            )
        if not sets:
            pickles = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".ckpt")]
            came = f"{pickles[0]}, a pickle that could run code" if pickles else "none"
            others = " or ".join(repr(name) for name in variants if name)
            raise UserError(
                f"expected safetensors weights in {folder}, got {came}"
                + (f" but those of variant {others}; load them with variant=" if others else "; ")
                + (others or "take a revision or a copy of the checkpoint that has them")
            )
        return sets[0]

    def load(self, dtype: torch.dtype, parts: Sequence[str], absent: Sequence[str]) -> Any:
        """Load the diffusers pipeline, on the CPU.

        Args:
            dtype: of the weights.
            parts: that must be there.
            absent: parts and options of the pipeline class to leave out.
        """
        import diffusers

        self.check(parts)
        pipeline = getattr(diffusers, self.kind)
        options = dict.fromkeys(absent) | {"dtype": dtype, "local_files_only": True}
        with quiet(), damaged(self.source):
            if self.file and self.alone:
                options[self.alone] = self._network(self.file, dtype)
            elif self.file:
                return pipeline.from_single_file(str(self.file), config=str(self.folder), **options)
            return pipeline.from_pretrained(
                str(self.folder), variant=self.variant, use_safetensors=True, **options
            )

    def _network(self, file: Path, dtype: torch.dtype) -> Any:
        """Load the network of a single file that has nothing else that is used."""
        import diffusers

        net, folder = "model.diffusion_model.", self.folder or Path()
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            own = [name for name in names if name.startswith(net)] or names
            state = {name.removeprefix(net): weights.get_tensor(name) for name in own}
        kind = getattr(diffusers, read_index(folder / INDEX)[self.alone][1])
        made = kind.from_single_file(
            state, config=str(folder), subfolder=self.alone, dtype=dtype, local_files_only=True
        )
        lacking = [name for name, value in made.state_dict().items() if value.is_meta]
        if lacking:
            raise UserError(
                f"expected the weights of a {kind.__name__} in {file}, got none of {lacking[0]}; "
                "give config=, a folder of configs for this model"
            )
        return made

    def _stored(self, parts: Iterable[str]) -> list[str]:
        """Return the parts whose weights are the folder's."""
        return [part for part in parts if not self.file or (self.alone and part != self.alone)]

    def check(self, parts: Sequence[str]) -> None:
        """Refuse files that are not to be read, and parts that are missing."""
        for path in (self.folder or Path()).glob("*/*"):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"expected files in {self.folder}, got {path}, a pipe or the like")
        for part in (*parts, "scheduler"):
            self.config(part)
        whole = [part for part in self._stored(parts) if self.weights(part)]  # which raises if not
        if not self.file:
            variants = {name for part in whole for name in self._variants(part)}
            if self.variant and self.variant not in variants:
                there = sorted(repr(name) for name in variants if name)
                raise UserError(
                    f"expected weights of variant {self.variant!r} in {self.folder}, got "
                    f"{', '.join(there) or 'none of any variant'}; leave variant out, or name one "
                    "that is there"
                )

    def config(self, part: str) -> Config:
        """Read the config of a part, with no number above `MAX_NUMBER`."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        path = (self.folder or Path()) / part / name
        config = read_json(path, f"{part} of a checkpoint")
        if not isinstance(config, dict):
            raise UserError(f"expected settings by name in {path}, got others; download it again")
        if "quantization_config" in config:
            raise UserError(
                f"expected weights of {part} in {self.source} as they were trained, got quantised "
                "ones (quantization_config); take another checkpoint"
            )
        for key, value in config.items():
            if _largest({key: value}) > MAX_NUMBER:
                raise UserError(
                    f"expected numbers up to {MAX_NUMBER:,} in {path}, got {key} = "
                    f"{str(value)[:60]}; download it again"
                )
        return config

    def digest(self, parts: Iterable[str]) -> str:
        """Compute the SHA-256 of the parts' configs and of some rows of each of their tensors."""
        total, files = hashlib.sha256(), [("", self.file)] if self.file else []
        for part in sorted(parts):
            config = essential(self.config(part))
            total.update(json.dumps([part, config], sort_keys=True).encode())
        for part in sorted(self._stored(parts)):
            files += [(part, path) for path in self.weights(part)]
        for part, path in files:
            total.update(part.encode())
            for piece in samples_of(path):
                total.update(piece)
        return total.hexdigest()


def read_index(path: Path) -> Config:
    """Read a ``model_index.json``; raise `UserError` if it is missing or damaged."""
    index = read_json(path, "a diffusers pipeline, as save_pretrained writes it,")
    if isinstance(index, dict) and isinstance(index.get("_class_name"), list):
        index["_class_name"] = (index["_class_name"] or [None])[-1]  # behind the name of its code
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UserError(
            f"expected the name of a pipeline class in {path}, got none; download it again, or "
            "give the folder that save_pretrained wrote"
        )
    return index


def _shards(index: Path) -> list[Path]:
    """List the files that an index of weights names, safetensors beside it: pickles run code."""
    record = read_json(index, "an index of weights")
    places = record.get("weight_map") if isinstance(record, dict) else None
    names = sorted({*map(str, places.values())}) if isinstance(places, dict) else []
    files = [index.parent / name for name in names]
    for name, path in zip(names or ["no files"], files or [index], strict=True):
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", name) or not path.is_file():
            raise UserError(
                f"expected an index of safetensors files beside it, got {name} in {index}; "
                "take a revision or a copy of the checkpoint that has them"
            )
    return files


def check_indices(folder: Path) -> None:
    """Refuse a model's folder whose index of weights names a pickle."""
    for path in folder.glob("*.index*.json"):
        _shards(path)


def _largest(value: object) -> float:
    """Find the largest number in a setting, however deep in lists."""
    if isinstance(value, dict):
        value = [inner for key, inner in value.items() if not key.endswith(_UNBOUNDED)]
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


def essential(config: Config) -> Config:
    """Return a part's config without the library that wrote it and its precision."""
    bookkeeping = ("architectures", "dtype", "torch_dtype", "transformers_version")
    return {k: v for k, v in config.items() if k not in bookkeeping and not k.startswith("_")}


def samples_of(path: Path) -> Iterator[bytes]:
    """Read name, type and shape of each tensor of a safetensors file, and some of its rows.

    Small tensors come whole, others by `_ROWS` rows from the first to the last. Only these are read
    from the disk; a change of other rows goes unseen.
    """
    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys()):
            rows = file.get_slice(key)
            shape = rows.get_shape()
            yield json.dumps([key, rows.get_dtype(), shape]).encode()
            if math.prod(shape) <= _MAX_WHOLE:
                pieces = [file.get_tensor(key)]
            else:
                picked = {round(k * (shape[0] - 1) / (_ROWS - 1)) for k in range(_ROWS)}
                pieces = [rows[row : row + 1] for row in sorted(picked)]
            for piece in pieces:
                yield piece.reshape(-1).view(torch.uint8).numpy().tobytes()


def read_process(
    config: Mapping[str, Any],
    spacing: str = "trailing",
    clean_end: bool = True,
    zero_terminal_snr: bool = False,
    mu: float | None = None,
) -> Process:
    """Read the process from a scheduler's config, whatever sampler it names.

    The spacing is not taken from there: it is mostly ``leading``, which does not begin every number
    of steps at the same level; see `VariancePreserving`.

    Args:
        config: with its class's defaults filled in.
        spacing: see `VariancePreserving`; the offset of ``leading`` is the config's.
        clean_end: see `VariancePreserving`.
        zero_terminal_snr: rescale the schedule, also where the file does not ask for it.
        mu: of a flow whose shift the file leaves to the resolution: its logarithm or, with
            ``time_shift_type`` linear, the shift itself.

    Raises:
        UserError: there is no process for the schedule or the prediction.
    """
    name = config.get("_class_name", "a scheduler")
    flow = "FlowMatch" in name
    dynamic = flow and mu is not None and config.get("use_dynamic_shifting") is True
    usual = _USUAL_FLOW | ({"use_dynamic_shifting": True} if dynamic else {})
    for field, value in (usual if flow else _USUAL_BETAS).items():
        if config.get(field) not in (value, None):
            raise UserError(
                f"expected a noise schedule with {field} {value}, got {name} with {field} "
                f"{config[field]}; take another checkpoint"
            )
    if dynamic and mu is not None:
        # to six digits, so that a fingerprint does not depend on a machine's exponential
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        return Flow(shift=float(f"{math.exp(mu) if exponential else mu:.6g}"), spacing=spacing)
    if flow:
        return Flow(shift=config.get("shift", 1.0), spacing=spacing)
    prediction = _PREDICTIONS.get(config.get("prediction_type", ""))
    if not prediction or "beta_schedule" not in config:
        raise UserError(
            "expected a noise schedule of β and a network that predicts epsilon or v, got "
            f"{name} with {config.get('prediction_type')} prediction; take another checkpoint"
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
