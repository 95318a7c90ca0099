"""Checkpoints that are independent of the number of workers."""
