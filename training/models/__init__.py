"""Classifiers: networks, heads, losses, metrics, fine-tuning."""
