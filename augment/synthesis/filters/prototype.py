"""Prototype filter: does a network find the image like the real ones of its class?"""

from dataclasses import dataclass

from augment.networks import feature_network, unit
from augment.networks.timm import network_of
from augment.synthesis.filters.reference import Reference, Scores, check_quantile, typical


@dataclass(frozen=True)
class Prototype:
    """Cosine to the mean feature of the class's real images, on the scale of their own.

    For the formula see `augment.synthesis.filters.reference.typical`. A class of few images, fewer
    than 128, is judged by the own cosines of real images of all classes.

    Args:
        model: a network of timm or of `augment.networks.NETWORKS`; its features before the head;
            by default that of a checkpoint, or resnet50.
        weights: a checkpoint of latent-augment train (``.ckpt``), a ``.safetensors`` file or
            another state dict, with or without the head; empty takes timm's pretrained ones.
        quantile: the share of real images that score below 0.
        minimum: keep images of this score and above: 1 is as typical as the median real image.

    Raises:
        UserError: the quantile is out of range.
    """

    model: str | None = None
    weights: str = ""
    quantile: float = 0.05
    minimum: float | None = 0.0

    def __post_init__(self) -> None:
        check_quantile(self.quantile)
        object.__setattr__(self, "model", network_of(self.model, self.weights, "resnet50"))

    def prepare(self, reference: Reference) -> Scores:
        """See `augment.synthesis.filters.Filter`.

        Raises:
            UserError: see `augment.networks.feature_network` and `typical`.
        """
        network = feature_network(self.model or "", self.weights, reference.device)
        return typical(reference, lambda images: unit(network(images)), self.quantile)
