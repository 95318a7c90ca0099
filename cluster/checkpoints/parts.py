"""The parts of a checkpoint, as its ranks write them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from ...storage.base import MissingObject, Store
from .layout import Part, parse

REQUESTS = 16  # at a time: a thousand in sequence take most of a minute


class Parts:
    """The parts that are written so far, each of which is read once.

    Args:
        prefix: of their keys: `step-000123/<attempt>/part-`; the rank and `.json` follow.
        attempt, world: of these writers; other parts are left out.
    """

    def __init__(self, store: Store, prefix: str, attempt: str, world: int) -> None:
        self._store, self._prefix, self._attempt, self._world = store, prefix, attempt, world
        self._found: dict[str, Part] = {}

    def by_rank(self) -> dict[int, Part]:
        """List the parts, and read those that are new."""
        new = [key for key in self._store.list(self._prefix) if key not in self._found]
        together(self._read, new)
        return {
            int(key.removeprefix(self._prefix).removesuffix(".json")): part
            for key, part in self._found.items()
            if (part.attempt, part.world) == (self._attempt, self._world)
        }

    def missing(self) -> list[int]:
        """The ranks whose parts are not written."""
        return sorted(set(range(self._world)) - set(self.by_rank()))

    def _read(self, key: str) -> None:
        try:
            self._found[key] = parse(Part, self._store.read(key), key)
        except MissingObject:  # rank 0 has committed and removed it meanwhile
            return


def together(call: Callable[[str], None], keys: Iterable[str]) -> None:
    """Call with every key, several at a time; raises the error of the first that failed."""
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="checkpoint-part") as pool:
        for _ in pool.map(call, keys):
            pass
