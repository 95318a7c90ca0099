"""The section of IMLE in the space of images: `method: imle-pixels`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .schedule import ScheduleConfig
from .section import Fraction, Positive, Section, Trait


class PixelsConfig(Section):
    """Training of the generator by the nearest of its own images (method: imle-pixels)."""

    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(ge=1, description="rounds of fresh candidates and matches")
    batch_size: Annotated[int, Trait.IN_REGISTRY] = Field(
        64, ge=1, description="global batch, over all workers; independent of their number"
    )
    candidates: Annotated[Positive, Trait.IN_REGISTRY] = Field(
        2.0, description="fresh images of G per training image and epoch, of which each takes the nearest"
    )
    side: int = Field(32, ge=4, le=64, description="larger images are averaged down to this side to be compared")
    lr: Annotated[Positive, Trait.IN_REGISTRY] = Field(1e-3, description="learning rate of the generator")
    betas: tuple[Fraction, Fraction] = Field((0.5, 0.999), description="Adam's betas")
    schedule: ScheduleConfig = ScheduleConfig()
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")

    def fault(self, sampler: str) -> str | None:
        """What is wrong with it beside this kind of sampler, and what to do."""
        if sampler != "prior":
            return "method=imle-pixels trains G on codes of a fixed distribution; set sampler.kind=prior"
        return None
