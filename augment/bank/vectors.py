"""User-supplied feature vectors, used to choose nearest neighbours."""

from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from augment.core.errors import UserError
from augment.core.files import reading


def read_vectors(path: Path, ids: list[str]) -> dict[str, Float[Tensor, " f"]]:
    """Read the vectors of images from a .safetensors file as float32; see `LatentBank.features`."""
    try:
        with reading(path, "vectors") as file:  # no pipe, which would never end
            vectors = {key: vector.float() for key, vector in load(file.read()).items()}
    except (UserError, SafetensorError) as error:
        raise UserError(
            f"expected latent or a readable .safetensors file of features, got {path} ({error}); "
            "check the path"
        ) from None
    missing = [i for i in ids if i not in vectors]
    if missing:
        raise UserError(
            f"expected a vector in {path} for each of {len(ids)} images of the bank, got none for "
            f"{missing[0]}; add it under that name"
        )
    shape = (vectors[ids[0]].numel(),)
    for image_id in ids:
        vector = vectors[image_id]
        if vector.shape != shape or not vector.isfinite().all():
            found = "NaN or infinity" if vector.shape == shape else f"shape {tuple(vector.shape)}"
            raise UserError(
                f"expected finite vectors in {path}, all of shape {shape}, got {found} for "
                f"{image_id}; repair that one"
            )
    return vectors
