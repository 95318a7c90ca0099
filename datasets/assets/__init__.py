"""Named weights and images that are fetched, checked and cached."""
