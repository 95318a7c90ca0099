"""Recipes. One YAML file each; `glann config NAME` prints one resolved."""
