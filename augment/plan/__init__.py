"""Plans: every random choice of one synthetic image, drawn once and written down."""
