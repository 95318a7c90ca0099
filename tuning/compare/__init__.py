"""Comparisons: a list of methods, trained and measured alike."""
