"""The parts of a data set while it is packed: its images, and in `held-out/` those that training never sees.

Each part is a packed data set with shards, index and state of its own.  Which images are held out depends on their
bytes only, so equal images are on the same side.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..storage.base import Store
from .index import HELD_OUT, INDEX_FILE, Index, parse
from .journal import begin
from .labels import Labels
from .left_out import counted
from .records import RECORD
from .shards import ShardWriter

IN_TRAINING = "equal to a training image, left out"
LEAST_EXPECTED = 10  # images of a held-out share, on average: with fewer there may be none, and nothing is measured
_DOMAIN = b"glann held-out "


@dataclass(frozen=True)
class Layout:
    """What all parts have in common: how images are stored."""

    name: str
    resolution: int
    channels: int
    image_format: str
    shard_bytes: int


class Part:
    """One part: its writer, or its index if it is finished. `close` it whatever happens.

    Args:
        store: of the part's own folder.
        recipe: hash of all that determines its bytes.
        count: images of its source.
        labels: of the images of its source.
        folder: for shards that are not complete.
    """

    def __init__(self, store: Store, recipe: str, count: int, layout: Layout, labels: Labels | None, folder: Path):
        self._url, self._recipe, self._layout = store.url, recipe, layout
        self.index: Index | None = None
        self._writer: ShardWriter | None = None
        if store.exists(INDEX_FILE):
            self.index = Index.load_from(store)
            if self.index.header.recipe != recipe:
                raise UserError(f"{store.url} holds another data set; choose another destination or delete it")
            return
        packing, records = begin(store, recipe_of_state(recipe, labels), count)
        shape = (layout.name, layout.image_format, layout.shard_bytes)
        self._writer = ShardWriter(store, packing, records, folder, *shape, labels)

    @property
    def position(self) -> int:
        """The position in the source from which packing continues."""
        return self._writer.position if self._writer else sys.maxsize

    @property
    def rows(self) -> int:
        if self._writer:
            return self._writer.rows
        return self.index.rows if self.index else 0

    @property
    def remarks(self) -> Mapping[str, int]:
        """The number of images by remark."""
        return self._writer.remarks if self._writer else Counter(self.index.header.remarks if self.index else {})

    def add(self, data: bytes, position: int, remarks: Iterable[str] = ()) -> None:
        """Append one image, unless an earlier run did; `position` is the position in the source after it."""
        if self._writer and position > self.position:
            self._writer.add(data, position, remarks)

    def pass_over(self, position: int, remark: str) -> None:
        """Count an image that is not added."""
        if self._writer and position > self.position:
            self._writer.pass_over(position, [remark])

    def records(self) -> np.ndarray:
        """The index records of all images so far, which are stored."""
        if self._writer:
            return np.frombuffer(self._writer.store_all(), RECORD)
        return self.index.records_N if self.index else np.empty(0, RECORD)

    def finish(self, **more) -> Index:  # type: ignore[no-untyped-def]
        """Complete the part. `more`: further arguments of `index.build`."""
        if self._writer:
            shape = {key: getattr(self._layout, key) for key in ("name", "resolution", "channels", "image_format")}
            self.index = parse(*self._writer.finish(recipe=self._recipe, **shape, **more), self._url)
            self._writer.close()
            self._writer = None
        if self.index is None:
            raise UserError(f"{self._url} is not packed")
        return self.index

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def recipe_of_state(recipe: str, labels: Labels | None) -> str:
    """The hash by which an unfinished part is recognised: its labels cannot change either."""
    return hashlib.sha256(f"{recipe} {labels.identity}".encode()).hexdigest() if labels else recipe


Taker = Callable[[bytes, int, Iterable[str]], None]  # an encoded image, the position after it, remarks on it


def by_content(training: Part, held_out: Part, share: float) -> Taker:
    """Hold out this share of images, by a hash of their bytes."""

    def take(data: bytes, position: int, remarks: Iterable[str]) -> None:
        (held_out if is_held_out(data, share) else training).add(data, position, remarks)

    return take


def unless_training(training: Part, held_out: Part) -> Taker:
    """Hold out all images but those that are training images, too, to the byte."""
    known_N = np.sort(_short(training.records()["sha256"]))

    def take(data: bytes, position: int, remarks: Iterable[str]) -> None:
        short = _short(np.frombuffer(hashlib.sha256(data).digest(), np.uint8)[None])[0]
        at = int(np.searchsorted(known_N, short))
        if at < len(known_N) and known_N[at] == short:
            held_out.pass_over(position, IN_TRAINING)
        else:
            held_out.add(data, position, remarks)

    return take


def is_held_out(data: bytes, share: float) -> bool:
    """Whether an image belongs to the held-out share: a function of its bytes alone."""
    return int.from_bytes(hashlib.sha256(_DOMAIN + data).digest()[:8], "big") < share * 2.0**64


def _short(sha256_N32: np.ndarray) -> np.ndarray:
    """The first 8 bytes of hashes: a billion images have no two equal ones by chance but once in 37 times."""
    return np.ascontiguousarray(sha256_N32[:, :8]).view("<u8")[:, 0]


def require_share(share: float, images: int) -> None:
    """Refuse a held-out share that is none, or leaves no images for one side. Raises UserError."""
    if not 0 <= share <= 0.9:
        raise UserError(f"holdout={share:g} is not possible; use a share from 0 (none) to 0.9")
    if share and share * images < LEAST_EXPECTED:
        raise UserError(
            f"holdout={share:g} of {counted(images, 'image')} is fewer than {LEAST_EXPECTED}; hold out a larger share, "
            f"or pack other images and name them as evaluation.data"
        )


def require_both(training: Part, held_out: Part) -> None:
    """Refuse a data set of which one side is empty. Raises UserError."""
    for part, side in ((training, "training"), (held_out, HELD_OUT)):
        if part.rows < 2:
            found = counted(part.rows, "image")
            raise UserError(f"{found} would be {side}; hold out another share, or none with --holdout 0")
