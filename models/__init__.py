"""Networks and losses in plain PyTorch: generators, mapping, perceptual networks."""
