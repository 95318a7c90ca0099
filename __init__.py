"""glann: Generative Latent Nearest Neighbors (Hoshen, Li & Malik, CVPR 2019) on a Ray cluster."""

__version__ = "0.1.0"
