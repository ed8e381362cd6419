"""Jobs: long work in units, done by one process, by ranks, or by a Ray cluster."""

__all__: list[str] = []
