"""From normal noise to latent codes: one file per kind of sampler."""
