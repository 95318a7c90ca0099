"""How good images are: Frechet distance, reconstruction error, and the features under them."""
