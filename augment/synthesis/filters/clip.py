"""CLIP filter: does the image show what the class's prompt says, or what its real images show?

Radford et al., *Learning Transferable Visual Models from Natural Language Supervision*,
arXiv 2103.00020.
"""

from dataclasses import dataclass

from augment.core.errors import UserError, lookup
from augment.networks.clip import DEFAULT, load_clip
from augment.synthesis.filters.reference import Reference, Scores, check_quantile, typical

TARGETS = ("prompt", "images")


@dataclass(frozen=True)
class Clip:
    """Cosine of CLIP features to the class's prompt or images, on the scale of the real images'.

    For the formula see `augment.synthesis.filters.reference.typical`.

    Args:
        model: a CLIP of transformers: a folder, or a repository of the hub.
        to: ``prompt`` or ``images``.
        quantile: the share of real images that score below 0.
        minimum: keep images of this score and above: 1 is as typical as the median real image.

    Raises:
        UserError: a setting is out of range.
    """

    model: str = DEFAULT
    to: str = "prompt"
    quantile: float = 0.05
    minimum: float | None = 0.0

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(TARGETS), self.to, "thing to compare with")
        check_quantile(self.quantile)

    def prepare(self, reference: Reference) -> Scores:
        """See `augment.synthesis.filters.Filter`.

        Raises:
            UserError: transformers or the model is missing, or a class has no prompt or one that is
                too long; and see `typical`.
        """
        bare = [name for name, p in zip(reference.classes, reference.prompts, strict=True) if not p]
        if self.to == "prompt" and bare:
            raise UserError(
                f"expected a prompt for every class, got none for {bare[0]!r}; give it one, or "
                "compare to images"
            )
        clip = load_clip(self.model, reference.device)
        texts = clip.texts(reference.prompts) if self.to == "prompt" else None
        return typical(reference, clip.images, self.quantile, texts)
