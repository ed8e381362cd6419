"""Plans: every random choice of one synthetic image, drawn once and written down."""

__all__: list[str] = []
