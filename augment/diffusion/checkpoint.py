"""Diffusers checkpoints: their parts, their process, whether they are still the same.

A checkpoint is a pipeline folder with a ``model_index.json``, here or in a repository of the
Hugging Face hub, or one ``.safetensors`` file with the names of the original releases; which, says
`augment.diffusion.find`. Weights are read from safetensors alone, which cannot run code as pickles
can, and no code comes from the hub.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from augment.diffusion.hub import INDEX, damaged, explained, quiet
from augment.diffusion.process import Flow, Process, VariancePreserving
from augment.errors import UserError

NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of a pipeline that have weights and matter to us."""

SAMPLED = 4096
"""Tensors of more values are told apart by `ROWS` of their rows."""

ROWS = 16

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
    """Name, type and shape of each tensor of a safetensors file, and some of its rows.

    Small tensors come whole, others by `ROWS` rows from the first to the last. Only these are read
    from the disk; what was changed in all the others alone goes unseen.
    """
    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys()):
            rows = file.get_slice(key)
            shape = rows.get_shape()
            yield json.dumps([key, rows.get_dtype(), shape]).encode()
            if math.prod(shape) <= SAMPLED:
                pieces = [file.get_tensor(key)]
            else:
                picked = {round(k * (shape[0] - 1) / (ROWS - 1)) for k in range(ROWS)}
                pieces = [rows[row : row + 1] for row in sorted(picked)]
            for piece in pieces:
                yield piece.reshape(-1).view(torch.uint8).numpy().tobytes()


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
