"""Runs as jobs of a remote Ray cluster."""
