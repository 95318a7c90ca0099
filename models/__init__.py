"""Pure torch.nn: generators, mapping, perceptual networks and losses."""
