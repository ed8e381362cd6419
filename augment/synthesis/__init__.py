"""From plans to images: the synthesizer, refinement, filters, the torch Dataset."""

__all__: list[str] = []
