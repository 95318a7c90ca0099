"""Sources of images to pack."""
