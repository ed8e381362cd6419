"""A pool of synthetic images that a process keeps refilling."""
