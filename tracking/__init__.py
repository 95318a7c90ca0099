"""Tracking of runs in MLflow, and its model registry."""
