"""Real and synthetic images for training: draws, transforms, the data module."""
