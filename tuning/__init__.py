"""Hyper-parameter studies over recipes."""
