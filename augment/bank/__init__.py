"""Banks on disk: their format, how they are filled, read, verified, merged."""

__all__: list[str] = []
