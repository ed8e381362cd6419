"""Adaptation: fitting a backbone to the user's classes by low-rank weights and class tokens."""

__all__: list[str] = []
