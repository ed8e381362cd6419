"""Classifiers: networks, heads, losses, metrics, fine-tuning."""

__all__: list[str] = []
