"""Training: stages, engines, and the driver that launches workers."""
