"""Samplers, which map normal noise to latent codes: one module per kind."""
