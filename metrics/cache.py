"""Features of real images, kept between evaluations: they cost most of one, and do not change.

Files are in `features/` of the cache folder, named by what they follow from: the images, the extractor with its
weights, and the kind of device.

Legend: N images, F feature dimension, B batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..datasets.assets.catalogue import ASSETS, cache_dir
from ..errors import GlannError
from ..storage.files import write_whole
from .features.extractor import EXTRACTORS, Extractor

log = logging.getLogger(__name__)

VERSION = 1  # to be raised when an extractor gives other features than before
LARGEST_FILE, LARGEST_FOLDER = 256 << 20, 1 << 30  # bytes; larger sets are not kept, older files are removed


def path_of(fingerprint: str, rows: int, extractor: Extractor) -> Path | None:
    """Where the features of the first `rows` images of a data set are kept; None if they are not to be kept.

    Args:
        fingerprint: of the data set.
    """
    spec = EXTRACTORS.get(extractor.name)
    if spec is None or spec.weights not in ASSETS or 4 * rows * extractor.dim > LARGEST_FILE:
        return None
    source = [VERSION, fingerprint, rows, extractor.name, extractor.device.type, ASSETS[spec.weights].sha256]
    name = hashlib.sha256(json.dumps(source).encode()).hexdigest()
    return cache_dir() / "features" / f"{name}.safetensors"


def load(path: Path, rows: int, dim: int) -> Tensor | None:
    """The features [N, F] of a file; None if there is none, or it is damaged: it is made again then."""
    try:
        features_NF = safetensors.torch.load_file(path)["features"]
        path.touch()
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    whole = features_NF.shape == (rows, dim) and features_NF.dtype == torch.float32
    return features_NF if whole and bool(features_NF.isfinite().all()) else None


def save(path: Path, features_NF: Tensor) -> None:
    """Keep the features, and remove the files that were not used for longest.

    A cache that cannot be written is logged, and the evaluation does without.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, safetensors.torch.save({"features": features_NF.contiguous()}), durable=False)
        held = 0
        for file in sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True):
            held += file.stat().st_size
            if held > LARGEST_FOLDER:
                file.unlink(missing_ok=True)
    except (OSError, GlannError) as error:
        log.warning("the features of the real images are not kept: %s", error)


@dataclass
class Recorder:
    """An extractor that keeps what it has returned."""

    extractor: Extractor
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, img_BCHW: Tensor) -> Tensor:
        features_BF = self.extractor(img_BCHW)
        self.seen.append(features_BF)
        return features_BF
