"""Execution of a run: driver, workers, recovery and reporting."""
