"""Packaged models on disk, and sampling from them."""
