"""Distributed state, independent of any loss: latent rows, nearest neighbours, placement, checkpoints, nodes, jobs."""
