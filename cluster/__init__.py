"""What is distributed and knows no loss: latent rows, neighbours, placement, checkpoints, preflight."""
