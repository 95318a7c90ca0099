"""Methods: the stages of a run, in order. Each stage is a module of that name in trainers/."""

from __future__ import annotations

from typing import Any, Literal, cast

# One entry per method.
METHODS: dict[str, tuple[str, ...]] = {
    "glann": ("glo", "sampler"),
    "gan": ("networks",),
    "autoencoder": ("autoencoder", "sampler"),
    "ae-ot-gan": ("autoencoder", "sampler", "networks"),
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


def has_critic_stage(method: str) -> bool:
    """Whether a stage trains the generator against a critic, from scratch or from an autoencoder's decoder."""
    return "networks" in METHODS.get(method, ())


def refines(method: str) -> bool:
    """Whether that stage refines a generator whose images have codes."""
    return has_critic_stage(method) and has_codes(method)


def batched_stages(method: str) -> tuple[Trainer, ...]:
    """The stages of a method that read the images in batches; the keys of each are the section of its name."""
    return tuple(cast(Trainer, stage) for stage in METHODS.get(method, ()) if stage in SECTIONS)


def unused_sections(method: str) -> tuple[str, ...]:
    """Sections that a method has no stage for: they are not written, and may not be given."""
    used = {section for stage in batched_stages(method) or (trainer_of(method),) for section in SECTIONS[stage]}
    every = dict.fromkeys(section for sections in SECTIONS.values() for section in sections)
    return tuple(section for section in every if section not in used)


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
    for own in batched_stages(method):
        if own not in NEUTRAL and tree.get(own) is None:
            raise ValueError(f"missing key {own}.epochs: method={method} needs the section {own}")
    return tree | {name: NEUTRAL[name] for name in unused if name in NEUTRAL}
