"""Synthetic images as webdataset shards: format, writing, reading, export."""

__all__: list[str] = []
