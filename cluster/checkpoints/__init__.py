"""Checkpoints that do not depend on the number of workers."""
