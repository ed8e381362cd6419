"""A pool of synthetic images that a process keeps refilling."""

__all__: list[str] = []
