"""Lightning training of classifiers on real and synthetic images.

pytorch_lightning, timm and torchmetrics live only here.
"""

__all__: list[str] = []
