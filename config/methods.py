"""Methods: the stages of a run, in order. Each stage is a module of that name in trainers/."""

from __future__ import annotations

from typing import Any

# One entry per method.
METHODS: dict[str, tuple[str, ...]] = {"glann": ("glo", "sampler"), "gan": ("networks",)}


def has_codes(method: str) -> bool:
    """Whether a method has a latent code for every image, which GLO trains."""
    return "glo" in METHODS.get(method, ("glo",))


def unused_sections(method: str) -> tuple[str, ...]:
    """Sections that a method has no stage for: they are not written, and may not be given."""
    return ("networks",) if has_codes(method) else ("glo", "loss")


def with_unused(tree: dict[str, Any]) -> dict[str, Any]:
    """Add neutral values of the sections that the method does not use.

    Raises:
        ValueError: such a section is given, or the one that the method needs is not.
    """
    method = tree.get("method", "glann")
    if method not in METHODS:
        return tree  # refused below
    unused = unused_sections(method)
    for name in unused:
        if tree.get(name) is not None:
            raise ValueError(f"{name}.* are keys of another method than method={method}; leave them out")
    if "networks" in unused:
        return tree
    if tree.get("networks") is None:
        raise ValueError(f"missing key networks.epochs: method={method} needs the section networks")
    return tree | {"glo": {"epochs": 1}, "loss": {"kind": "l1"}}  # never read, and nothing to be fetched
