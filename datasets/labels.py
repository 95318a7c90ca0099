"""Labels of the images of a data set: integers in columns, -1 where one is not known.

They are for judges, and for generators that are trained with labels (method=gan); GLANN does not read them.

Legend: N images, L columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from .left_out import Text

UNKNOWN = -1
LABEL = np.dtype("<i4")
MAX_COLUMNS = 4096


class LabelColumn(BaseModel):
    """The name of a column, and the words for its values 0, 1, ... where they have some."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: Text
    values: tuple[Text, ...] = ()


class LabelsEntry(BaseModel):
    """What `index.json` says of `labels.bin`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    columns: tuple[LabelColumn, ...] = Field(min_length=1, max_length=MAX_COLUMNS)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    source: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # hash of the labels that were given


@dataclass(frozen=True, eq=False)
class Labels:
    """`value_NL`: int32, at least -1; rows are those of the images, in their order."""

    columns: tuple[LabelColumn, ...]
    value_NL: np.ndarray

    @property
    def identity(self) -> str:
        """A hash of the names and the values."""
        digest = hashlib.sha256(repr([(column.name, column.values) for column in self.columns]).encode())
        digest.update(np.ascontiguousarray(self.value_NL, LABEL).data)
        return digest.hexdigest()

    def column(self, name: str) -> np.ndarray:
        """The values of a column, int32 [N]. Raises UserError if there is none of that name."""
        names = [column.name for column in self.columns]
        if name not in names:
            raise UserError(f"no label is called {name}; there are {', '.join(names[:20])}")
        return self.value_NL[:, names.index(name)]


def of_column(name: str, value_N: np.ndarray, values: Sequence[str] = ()) -> Labels:
    """Labels of one column."""
    return Labels((LabelColumn(name=name, values=tuple(values)),), np.asarray(value_N, LABEL).reshape(-1, 1))


def column_names(columns: Sequence[LabelColumn]) -> str:
    """`digit`, or `Smiling, Male, Young and 37 more`."""
    names = [column.name for column in columns]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
