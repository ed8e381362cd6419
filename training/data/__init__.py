"""Real and synthetic images for training: draws, transforms, the data module."""

__all__: list[str] = []
