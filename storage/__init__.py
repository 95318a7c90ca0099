"""Persistent files: local folders and S3 behind one interface with atomic writes."""
