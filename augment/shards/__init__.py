"""Synthetic images as webdataset shards: format, writing, reading, export."""
