"""A trained model: its package on disk, and drawing from it."""
