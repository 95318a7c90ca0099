"""Compatibility: models that glann 0.1 logged to MLflow contain code that imports `load_model` from here."""

from ..inference.package import load_model

__all__ = ["load_model"]
