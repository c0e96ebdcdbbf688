"""Shards that keep the image files: tars with an index beside each, here or behind a URL."""
