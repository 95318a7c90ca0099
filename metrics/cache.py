"""Tallies of real images, kept between evaluations: they cost most of one, and do not change.

A file holds one kind of tally of both parts of a set, as arrays. It is in `tallies/` of the cache folder and, for data
in S3, in `evaluation/` beside them, for other machines. Its name is a hash of what it follows from: the images, the
parts, the extractor with its weights, and the kind of device.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..datasets.assets.catalogue import ASSETS, cache_dir
from ..errors import GlannError
from ..storage.base import MissingObject, Store
from ..storage.files import write_whole
from .features.extractor import EXTRACTORS, Extractor
from .tally import Tally

log = logging.getLogger(__name__)

VERSION = 2  # to be raised when an extractor gives other features than before, or a tally has other arrays
LARGEST_FOLDER = 1 << 30  # bytes; older files are removed
BESIDE = "evaluation"  # folder beside the data in S3
PARTS = ("some", "others")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TallyCache:
    """The kept tallies of the images of a data set that is cut in two parts.

    fingerprint, rows: of the data set. chosen: number of images in the first part. data: store of the data, if it is
    shared by machines.
    """

    fingerprint: str
    rows: int
    chosen: int
    data: Store | None = None

    def name(self, extractor: Extractor, tally: Tally) -> str | None:
        """The file's name; None if such tallies are not kept."""
        spec = EXTRACTORS.get(extractor.name)
        if spec is None or spec.weights not in ASSETS or not hasattr(tally, "to_arrays"):
            return None
        source = [VERSION, self.fingerprint, self.rows, self.chosen, extractor.name, extractor.device.type]
        source += [ASSETS[spec.weights].sha256, type(tally).__name__]
        return hashlib.sha256(json.dumps(source).encode()).hexdigest() + ".safetensors"

    def load(self, name: str, empty: Any) -> list[Tally] | None:
        """The tallies of both parts; None if they are not kept, or damaged: they are made again then.

        Args:
            empty: a tally of no images.
        """
        path = folder() / name
        for read in (path.read_bytes, lambda: self._beside(name)):
            try:
                arrays = safetensors.numpy.load(read())
                parts = [empty.from_arrays(_part(arrays, part)) for part in PARTS]
            except (OSError, GlannError, KeyError, ValueError, safetensors.SafetensorError):
                continue
            if all(np.isfinite(array).all() for array in arrays.values()):
                _keep(path, arrays)
                return parts
        return None

    def _beside(self, name: str) -> bytes:
        if self.data is None:
            raise MissingObject("the data are on this machine")
        return self.data.read(f"{BESIDE}/{name}")

    def save(self, name: str, tallies: list[Any]) -> None:
        """Keep the tallies of both parts. Where that is not possible it is logged, and the evaluation does without."""
        arrays = {
            f"{part}.{key}": np.ascontiguousarray(array)
            for part, tally in zip(PARTS, tallies, strict=True)
            for key, array in tally.to_arrays().items()
        }
        _keep(folder() / name, arrays)
        if self.data is not None:
            try:
                self.data.write(f"{BESIDE}/{name}", safetensors.numpy.save(arrays))
            except GlannError as error:
                log.warning("the tallies of the real images are not kept beside them: %s", error)


def folder() -> Path:
    return cache_dir() / "tallies"


def _part(arrays: Arrays, part: str) -> Arrays:
    return {key.removeprefix(f"{part}."): array for key, array in arrays.items() if key.startswith(f"{part}.")}


def _keep(path: Path, arrays: Arrays) -> None:
    """Write the file if it is not there, and remove those that were not used for longest."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, safetensors.numpy.save(arrays), durable=False)
        held = 0
        for file in sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True):
            held += file.stat().st_size
            if held > LARGEST_FOLDER:
                file.unlink(missing_ok=True)
    except (OSError, GlannError) as error:
        log.warning("the tallies of the real images are not kept: %s", error)
