"""The nodes of a Ray cluster: joining, capacity, draining."""
