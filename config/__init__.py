"""The configuration of a run: sections, recipes, overrides, and one-line validation errors."""
