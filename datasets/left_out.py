"""What a data set does not hold of its source: counts by reason with a few places, for the index and the screen.

The size does not grow with the number of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MASK = "mask"
EXCLUDED = "excluded"
HIDDEN_FOLDER = "hidden folder"
SYSTEM_FOLDER = "system folder"
HIDDEN_FILE = "hidden file"
NO_EXTENSION = "no extension"
OTHER_EXTENSION = "other extension"
SPECIAL = "special"
BESIDE = "beside"
UNREADABLE = "unreadable"

# reason -> words for one and for several; any other reason is a file extension
_WORDS = {
    MASK: ("mask", "masks"),
    EXCLUDED: ("by --exclude",) * 2,
    HIDDEN_FOLDER: ("in hidden folders",) * 2,
    SYSTEM_FOLDER: ("in folders of the system",) * 2,
    HIDDEN_FILE: ("hidden file", "hidden files"),
    NO_EXTENSION: ("without extension",) * 2,
    OTHER_EXTENSION: ("with another extension",) * 2,
    SPECIAL: ("link, pipe or device", "links, pipes or devices"),
    BESIDE: ("beside the packed data set",) * 2,
    UNREADABLE: ("unreadable image", "unreadable images"),
}
MAX_PLACES = 3
MAX_REASONS = 40  # in an index
MAX_TEXT = 400
_MAX_COUNTED = 4096  # in memory
_SHOWN = 8  # on the screen

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


class LeftOut(BaseModel):
    """A number of files that are left out for one reason, and where: folders or examples, in order of name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    reason: Text
    count: int = Field(ge=1, le=1 << 48)
    places: tuple[Text, ...] = Field((), max_length=MAX_PLACES)


class Tally:
    """Counts of what is left out, by reason, with the first places by name."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def add(self, reason: str, place: str = "", count: int = 1) -> None:
        """Count files. `place`: the folder or an example to show."""
        reason, place = printable(reason)[:MAX_TEXT], printable(place)[:MAX_TEXT]
        if reason not in self._counts and len(self._counts) >= _MAX_COUNTED:
            reason, place = OTHER_EXTENSION, ""
        self._counts[reason] += count
        places = self._places.setdefault(reason, [])
        if place and place not in places and (len(places) < MAX_PLACES or place < places[-1]):
            self._places[reason] = sorted([*places, place])[:MAX_PLACES]

    def add_all(self, groups: Iterable[LeftOut]) -> None:
        """Count what another tally has counted."""
        for group in groups:
            self.add(group.reason, count=group.count)
            for place in group.places:
                self.add(group.reason, place, 0)

    def groups(self) -> tuple[LeftOut, ...]:
        """The counts, the largest first; of the extensions only the most frequent by themselves."""
        order = sorted(self._counts, key=lambda reason: (reason not in _WORDS, -self._counts[reason], reason))
        if rare := order[MAX_REASONS:]:
            self._counts[OTHER_EXTENSION] += sum(self._counts.pop(reason) for reason in rare)
            order = [*(reason for reason in order[:MAX_REASONS] if reason != OTHER_EXTENSION), OTHER_EXTENSION]
        order.sort(key=lambda reason: (-self._counts[reason], reason))
        return tuple(
            LeftOut(reason=reason, count=self._counts[reason], places=tuple(self._places.get(reason, ())))
            for reason in order
        )


def in_words(groups: Iterable[LeftOut]) -> str:
    """`9 masks (CelebAMask-HQ-mask-anno/), 1 .heic, 2 in hidden folders (.git/, .Trash-1000/)`."""
    groups = list(groups)
    words = [_words(group) for group in groups[:_SHOWN]]
    if rest := groups[_SHOWN:]:
        words.append(f"{sum(group.count for group in rest)} for {len(rest)} other reasons")
    return ", ".join(words)


def _words(group: LeftOut) -> str:
    one, several = _WORDS.get(group.reason, (group.reason, group.reason))
    places = f" ({', '.join(group.places)})" if group.places else ""
    return printable(f"{group.count} {one if group.count == 1 else several}{places}")


def remarks_in_words(remarks: Mapping[str, int]) -> str:
    """`2 with an unusable colour profile, taken as sRGB`."""
    return "; ".join(printable(f"{count} {remark}") for remark, count in sorted(remarks.items()))


def printable(text: str) -> str:
    """The text without characters that a terminal or a JSON file would not show as they are."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def counted(number: int, one: str) -> str:
    """`1 shard`, `2 shards`, `0 shards`."""
    return f"{number} {one}" if number == 1 else f"{number} {one}s"
