"""The classifier: a network, cross-entropy, and accuracy overall and by class."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from augment.errors import UserError


def small_cnn(channels: int, num_classes: int, width: int = 32) -> nn.Sequential:
    """Three strided 3×3 convolutions with batch norm, mean pooling and a linear head.

    Made for 32×32 images and a few hundred of them: 0.1 M parameters, milliseconds a step.
    """
    layers: list[nn.Module] = []
    for wide in (width, 2 * width, 4 * width):
        layers += [
            nn.Conv2d(channels, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        ]
        channels = wide
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * channels, num_classes),
    )


def build_network(name: str, channels: int, num_classes: int) -> nn.Module:
    """``small_cnn`` or any network of timm.

    Raises:
        UserError: timm is not installed or does not know the name.
    """
    if name == "small_cnn":
        return small_cnn(channels, num_classes)
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(
            f"expected timm for the network {name!r}, got none; pip install 'latent-augment[train]'"
        ) from None
    if not timm.is_model(name):
        raise UserError(
            f"expected small_cnn or a timm network, got {name!r}; see timm.list_models()"
        )
    return timm.create_model(name, in_chans=channels, num_classes=num_classes)


class Classifier(pl.LightningModule):
    """A classifier trained by AdamW with a cosine schedule over ``trainer.max_steps``.

    Args:
        num_classes: number of classes.
        network: ``small_cnn`` or the name of a timm network.
        channels: image channels.
        lr, weight_decay: of AdamW.
        mixup: α of mixup (Zhang et al., arXiv 1710.09412); 0 is none.

    Raises:
        UserError: an unknown network.
    """

    def __init__(
        self,
        num_classes: int,
        network: str = "small_cnn",
        channels: int = 1,
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
        mixup: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = build_network(network, channels, num_classes)
        self.mixup = v2.MixUp(alpha=mixup, num_classes=num_classes) if mixup else None
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.per_class = MulticlassAccuracy(num_classes, average="none")

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.network(images - 0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy; with mixup against soft labels."""
        images, labels = self.mixup(*batch) if self.mixup else batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def evaluation_step(self, batch: Any, batch_idx: int) -> None:
        """Count hits."""
        images, labels = batch
        logits = self(images)
        self.top1.update(logits, labels)
        self.per_class.update(logits, labels)

    def evaluation_end(self) -> None:
        """Log ``accuracy`` and ``accuracy/class_k``."""
        self.log("accuracy", self.top1.compute(), prog_bar=True)
        self.log_dict({f"accuracy/class_{k}": a for k, a in enumerate(self.per_class.compute())})
        self.top1.reset()
        self.per_class.reset()

    validation_step = test_step = evaluation_step
    on_validation_epoch_end = on_test_epoch_end = evaluation_end

    def configure_optimizers(self) -> Any:
        """AdamW; the rate falls along a half cosine to zero at ``trainer.max_steps``."""
        hp: Any = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=hp.lr, weight_decay=hp.weight_decay)
        steps = self.trainer.max_steps
        if steps < 1:
            raise UserError(f"expected trainer.max_steps ≥ 1, got {steps}; set --trainer.max_steps")
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]
