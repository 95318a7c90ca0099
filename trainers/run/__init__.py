"""The life of a run: from the driver to the workers and back."""
