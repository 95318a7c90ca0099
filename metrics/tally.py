"""Streaming statistics of metrics: updated batch by batch, and merged over workers.

Legend: B batch, F feature dimension, N kept images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from ..models.noise import philox4x32
from .distances import neighbour_distances

INDICES_AT_ONCE = 1 << 20
NEIGHBOURS = 5  # nearest others of an image whose distances are computed at once
KEPT = 10_000  # feature vectors that metrics of neighbours keep of a set
_KEY = (0x6B657074, 0)  # of the priorities; another key is another sample


class Tally(Protocol):
    """Sufficient statistics of a set of images. Immutable: `update` and `merge` return new ones.

    One that also has `to_arrays`, and `from_arrays` for an empty one of the same kind, is kept between evaluations.
    """

    def update(self, seen: Tensor, index_B: Tensor, /) -> Self:
        """Add one batch: uint8 images [B, C, H, W], or their features [B, F].

        Args:
            index_B: place of each image in its set, int64; a set has no index twice.
        """
        ...

    def merge(self, other: Self, /) -> Self:
        """The statistics of the union of both sets."""
        ...


@dataclass(frozen=True)
class Mean:
    """The running mean of one number per image."""

    count: int = 0
    total: float = 0.0

    def update(self, value_B: Tensor, index_B: Tensor, /) -> Mean:
        """Add the numbers of one batch, [B]."""
        return self.merge(Mean(len(value_B), float(value_B.sum())))

    def merge(self, other: Mean, /) -> Mean:
        """The mean over the union of both sets."""
        return Mean(self.count + other.count, self.total + other.total)

    def value(self) -> float:
        """The mean. Raises UserError if there were no images."""
        if self.count == 0:
            raise UserError("no images were compared, so there is no mean over them")
        return self.total / self.count


@dataclass(frozen=True, eq=False)
class KeptFeatures:
    """The feature vectors of at most `limit` images: those whose indices have the lowest priorities.

    The priority of an index is a fixed random number, so the sample is uniform without replacement, and a function of
    the set of indices alone: neither the batches nor the number of workers change it, to the last bit.
    """

    limit: int = KEPT
    _parts: tuple[tuple[Tensor, Tensor], ...] = field(default=(), repr=False)

    def update(self, features_BF: Tensor, index_B: Tensor, /) -> KeptFeatures:
        """Add one batch.

        Raises:
            UserError: the features hold NaN or infinity.
        """
        if not bool(features_BF.isfinite().all()):
            raise UserError("the features of some images are NaN or infinite; check the images and the weights")
        return self._with((index_B.long().cpu(), features_BF.detach().flatten(1).cpu()))

    def merge(self, other: KeptFeatures, /) -> KeptFeatures:
        """The sample of the union of both sets. Raises UserError if their limits differ."""
        if self.limit != other.limit:
            raise UserError(f"samples of at most {self.limit} and {other.limit} images cannot be merged")
        return self._with(*other._parts)

    @cached_property
    def index_N(self) -> NDArray[np.int64]:
        """Indices of the kept images, ascending."""
        return self._settled[0].numpy()

    @cached_property
    def features_NF(self) -> NDArray[np.float64]:
        """Their features, in the order of `index_N`.

        Raises:
            UserError: no images.
        """
        if not self._parts:
            raise UserError("no images were seen, so there are no features to compare")
        return self._settled[1].double().numpy()

    def near(self, count: int) -> NDArray[np.float64]:
        """Distances of each image to its `count` nearest others, ascending, [N, K].

        Those of the nearest are computed once: every set that this one is compared with needs the same.

        Raises:
            UserError: too few images.
        """
        if count > min(NEIGHBOURS, len(self) - 1):
            return neighbour_distances(self.features_NF, count)
        return self._near_NK[:, :count]

    @cached_property
    def _near_NK(self) -> NDArray[np.float64]:
        return neighbour_distances(self.features_NF, min(NEIGHBOURS, len(self) - 1))

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Indices [N] and features [N, F] of the kept images, for `from_arrays`."""
        index_N, features_NF = self._settled
        return {"index": index_N.numpy(), "features": features_NF.numpy()}

    def from_arrays(self, arrays: dict[str, NDArray[np.generic]]) -> KeptFeatures:
        """The sample with these arrays, of the same limit. Raises ValueError if they do not fit one another."""
        index_N, features_NF = (torch.from_numpy(arrays[name]) for name in ("index", "features"))
        if index_N.dtype != torch.int64 or features_NF.dtype != torch.float32 or len(index_N) != len(features_NF):
            raise ValueError("these are no kept features")
        return self._with((index_N, features_NF))

    def first(self, count: int) -> KeptFeatures:
        """A sample of at most `count` of the images, as if that had been the limit."""
        if count >= len(self):
            return self
        return KeptFeatures(min(count, self.limit), (_lowest(self._parts, min(count, self.limit)),))

    def __len__(self) -> int:
        return len(self._settled[0])

    @cached_property
    def _settled(self) -> tuple[Tensor, Tensor]:
        if not self._parts:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
        index_N, features_NF = _lowest(self._parts, self.limit)
        order_N = index_N.argsort()
        return index_N[order_N], features_NF[order_N]

    def _with(self, *parts: tuple[Tensor, Tensor]) -> KeptFeatures:
        held = tuple(part for part in (*self._parts, *parts) if len(part[0]))
        if sum(len(index_B) for index_B, _ in held) > 2 * self.limit:
            held = (_lowest(held, self.limit),)
        return KeptFeatures(self.limit, held)


def _lowest(parts: tuple[tuple[Tensor, Tensor], ...], limit: int) -> tuple[Tensor, Tensor]:
    index_N = torch.cat([index_B for index_B, _ in parts])
    if len({features_BF.shape[1] for _, features_BF in parts}) != 1:
        raise UserError("features of different size cannot be compared; use one extractor for both")
    features_NF = torch.cat([features_BF for _, features_BF in parts])
    if len(index_N) <= limit:
        return index_N, features_NF
    # Priorities of 62 bits do not collide in practice; the stable order of sorted indices decides if they do.
    by_index_N = index_N.argsort()
    chosen_N = by_index_N[priority(index_N[by_index_N]).argsort(stable=True)[:limit]]
    return index_N[chosen_N], features_NF[chosen_N]


def lowest_priorities(count: int, limit: int) -> Tensor:
    """The `limit` indices below `count` that `KeptFeatures` would keep, ascending; block by block."""
    chosen_N = torch.zeros(0, dtype=torch.int64)
    for start in range(0, count, INDICES_AT_ONCE):
        seen_N = torch.cat([chosen_N, torch.arange(start, min(start + INDICES_AT_ONCE, count))])
        chosen_N = seen_N[priority(seen_N).argsort(stable=True)[:limit]].sort().values
    return chosen_N


def priority(index_B: Tensor) -> Tensor:
    """A random number of 62 bits for each index, int64 [B]: a function of the index alone."""
    zero_B = torch.zeros_like(index_B)
    high_B, low_B, *_ = philox4x32((index_B & 0xFFFFFFFF, index_B >> 32, zero_B, zero_B), _KEY)
    return ((high_B >> 1) << 31) | (low_B >> 1)
