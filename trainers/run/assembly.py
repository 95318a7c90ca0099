"""Previews of all workers put together in the driver."""

from __future__ import annotations

from ...reports import pictures
from ...reports.sheets import Sheet, Tile
from ..previews import RECONSTRUCTIONS, Pictures
from .events import Preview


class Assembly:
    """Parts of previews that wait for those of other workers."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, int], dict[int, Pictures]] = {}

    def add(self, part: Preview) -> dict[str, Sheet]:
        """The sheets of a preview by kind once the parts of all workers are there; empty before."""
        key = part.stage, part.epoch
        held = self.parts.setdefault(key, {})
        held[part.rank] = part.pictures
        if len(held) < part.workers:
            return {}
        del self.parts[key]
        return sheets_of(list(held.values()))

    def clear(self) -> None:
        """Forget incomplete previews: the workers that owe the rest have ended."""
        self.parts.clear()


def sheets_of(parts: list[Pictures]) -> dict[str, Sheet]:
    """The sheets of a preview by kind, from the parts of all workers; none of a kind without images."""
    sheets = {}
    for kind in dict.fromkeys(kind for part in parts for kind in part):
        tiles: dict[int, tuple[Tile, ...]] = {}
        for part in parts:
            tiles |= part.get(kind, {})
        ordered = [tiles[position] for position in sorted(tiles)]
        if not ordered:
            continue
        if kind == RECONSTRUCTIONS:
            sheets[kind] = Sheet(pictures.reconstructed(*zip(*ordered, strict=True)))
        else:
            sheets[kind] = Sheet(pictures.in_grid([tile for (tile,) in ordered]))
    return sheets
