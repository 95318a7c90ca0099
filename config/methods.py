"""Methods: the stages of a run, in order. Each stage is a module of that name in trainers/."""

from __future__ import annotations

from typing import Any, Literal, cast

# One entry per method.
METHODS: dict[str, tuple[str, ...]] = {
    "glann": ("glo", "sampler"),
    "gan": ("networks",),
    "autoencoder": ("autoencoder", "sampler"),
    "imle-pixels": ("pixels", "sampler"),
}

Trainer = Literal["glo", "networks", "autoencoder", "pixels"]
# Stages that train the generator, with the sections that each reads; the first is the stage's own.
SECTIONS: dict[Trainer, tuple[str, ...]] = {
    "glo": ("glo", "loss"),
    "networks": ("networks",),
    "autoencoder": ("autoencoder", "loss"),
    "pixels": ("pixels", "loss"),
}
# Values of sections that a method does not read: never used, and nothing to be fetched.
NEUTRAL: dict[str, dict[str, Any]] = {"glo": {"epochs": 1}, "loss": {"kind": "l1"}}


def trainer_of(method: str) -> Trainer:
    """The stage of a method that trains the generator; its keys are the section of that name."""
    return cast(Trainer, next((stage for stage in METHODS.get(method, ()) if stage in SECTIONS), "glo"))


def has_codes(method: str) -> bool:
    """Whether a method has a latent code for every image: GLO trains it, an encoder or a search writes it."""
    return trainer_of(method) != "networks"


def unused_sections(method: str) -> tuple[str, ...]:
    """Sections that a method has no stage for: they are not written, and may not be given."""
    every = dict.fromkeys(section for sections in SECTIONS.values() for section in sections)
    return tuple(section for section in every if section not in SECTIONS[trainer_of(method)])


def with_unused(tree: dict[str, Any]) -> dict[str, Any]:
    """Add neutral values of the sections that the method does not use.

    Raises:
        ValueError: such a section is given, or the one that the method needs is not.
    """
    method = tree.get("method", "glann")
    if method not in METHODS:
        return tree  # refused below
    unused, own = unused_sections(method), trainer_of(method)
    for name in unused:
        if tree.get(name) is not None:
            raise ValueError(f"{name}.* are keys of another method than method={method}; leave them out")
    if own not in NEUTRAL and tree.get(own) is None:
        raise ValueError(f"missing key {own}.epochs: method={method} needs the section {own}")
    return tree | {name: NEUTRAL[name] for name in unused if name in NEUTRAL}
