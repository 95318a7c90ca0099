"""What a generator and its critic are trained for: losses per row of the scores of real and generated images."""
