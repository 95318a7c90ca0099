"""Feature maps of this worker's images, computed at the first visit: a third of a step's work with a perceptual loss.

Shapes: B rows of a batch, n rows of this worker, V values of the feature maps of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..config.run import Config
from .plan.costs import maps_dtype, maps_values, require_cache_fits


class FeatureCache:
    """The maps of the rows of one worker, on its device, in the precision that they are computed in.

    Args:
        compute: images [B, C, H, W] in [0, 1] -> maps [B, V], as `PerceptualLoss.real_maps`.
    Raises:
        UserError: they need more than `loss.cache_features` gigabytes.
    """

    def __init__(self, config: Config, rows: range, device: torch.device, compute: Callable[[Tensor], Tensor]) -> None:
        require_cache_fits(config, len(rows))
        self.rows, self.compute = rows, compute
        self.maps_nV = torch.empty(len(rows), maps_values(config), dtype=maps_dtype(config), device=device)
        self.known_n = np.zeros(len(rows), bool)

    def maps(self, rows_B: np.ndarray, read_B: np.ndarray, img_BCHW: Tensor) -> Tensor:
        """The maps of a batch, [B, V].

        Args:
            read_B: bool; the other rows are padding, or have no readable image, and are not kept.
        """
        at_B = np.where(read_B, rows_B - self.rows.start, 0)
        if self.known_n[at_B[read_B]].all():
            return self.maps_nV[self._index(at_B)]
        maps_BV = self.compute(img_BCHW)
        self.maps_nV[self._index(at_B[read_B])] = maps_BV[self._index(np.flatnonzero(read_B))]
        self.known_n[at_B[read_B]] = True
        return maps_BV

    def _index(self, at_B: np.ndarray) -> Tensor:
        """An index on the device, for which the host does not wait."""
        return torch.from_numpy(at_B).to(self.maps_nV.device, non_blocking=True)
