"""N-way K-shot episodes."""
