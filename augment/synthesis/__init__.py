"""From plans to images: the synthesizer, refinement, filters, the torch Dataset."""
