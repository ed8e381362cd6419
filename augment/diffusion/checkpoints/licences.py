"""Licences of the weights of backbones, by the identifiers of the Hugging Face hub.

``docs/licences.md`` says what each allows.
"""

from augment.diffusion.backbone import Recipe
from augment.diffusion.checkpoints.hub import HUB

LICENCES = {
    "tiny": "mit",
    "tiny-cifar": "mit",
    "sd14": "creativeml-openrail-m",
    "sd15": "creativeml-openrail-m",
    "sd21": "openrail++",
    "sd21-base": "openrail++",
    "sdxl": "openrail++",
    "sd3": "stabilityai-ai-community",
    "sd35-medium": "stabilityai-ai-community",
    "sd35-large": "stabilityai-ai-community",
    "z-image": "apache-2.0",
    "flux2-klein": "apache-2.0",
    "flux1-dev": "flux-1-dev-non-commercial-license",
    "sit": "mit",
    "lightningdit": "mit",
    "dit": "cc-by-nc-4.0",
}
"""Licence of each backbone by its name."""

LINKS = {
    "stabilityai-ai-community": (
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-large/blob/main/LICENSE.md"
    ),
    "flux-1-dev-non-commercial-license": (
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    ),
}
"""Texts of licences that the hub has no identifier for."""


def licence_of(recipe: Recipe) -> str | None:
    """Return the licence of a backbone's weights; None if unknown, as of a folder or a LoRA.

    >>> licence_of({"name_or_path": "sd15"}), licence_of({"name_or_path": "me/model"})
    ('creativeml-openrail-m', None)

    Args:
        recipe: arguments of `load_backbone`; empty if unknown.
    """
    if any(recipe.get(key) for key in ("lora", "adapter", "ip_adapter")):  # others' weights
        return None
    names = {repository: name for name, repository in HUB.items()}
    given = str(recipe.get("name_or_path", ""))
    return LICENCES.get(names.get(given, given))
