"""What knows nothing of images: errors, random generators, files, locks, records."""

__all__: list[str] = []
