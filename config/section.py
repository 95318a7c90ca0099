"""The base of every section, and what is said of a key beside its type: the traits."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Trait(Enum):
    """A property of a key, or of all keys of a section, that other parts of glann go by."""

    RESUMABLE = "may change when a run is resumed: where and how it runs, not what it computes"
    NOT_SEARCHABLE = "is no property of a model, so a study cannot search it"
    SCHEDULABLE = "may change while a run trains, as population-based search does"
    IN_REGISTRY = "stands among the tags of a registered version"


class Section(BaseModel):
    """Base of every section: unknown keys are errors and values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    traits: ClassVar[tuple[Trait, ...]] = ()  # of all keys of the section
