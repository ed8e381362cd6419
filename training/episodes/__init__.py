"""N-way K-shot episodes."""

__all__: list[str] = []
