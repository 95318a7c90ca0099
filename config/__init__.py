"""The configuration of a run: sections, recipes, overrides, and what is wrong with them in one line."""
