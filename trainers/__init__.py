"""The two stages, the engine under them, and the driver that launches workers."""
