"""Evaluation: Fréchet distance, reconstruction error, and the feature extractors they use."""
