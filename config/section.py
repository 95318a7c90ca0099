"""The base class of sections, and the traits: properties of a key beside its type."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Trait(Enum):
    """A property of a key, or of all keys of a section, that other modules rely on."""

    RESUMABLE = "may change when a run is resumed: affects where and how it runs, not the result"
    NOT_SEARCHABLE = "is not a property of the model, so a study cannot search it"
    SCHEDULABLE = "may change during training, as in population-based search"
    IN_REGISTRY = "is a tag of registered model versions"


class Section(BaseModel):
    """Base class of sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    traits: ClassVar[tuple[Trait, ...]] = ()  # of all keys of the section

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        """YAML can write text, and a command line bytes, that no file, address or variable can hold."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("no text may hold a NUL character")
        if isinstance(value, str) and not value.isascii() and value != value.encode("utf-8", "replace").decode():
            raise ValueError("it is not UTF-8")
        return value
