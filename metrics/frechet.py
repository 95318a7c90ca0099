"""Fréchet distance between Gaussians fitted to image features (Heusel et al. 2017, Eq. 6).

Moments are accumulated in one pass over batches, on any number of workers, and merged.  All of it is
float64 on the host.

Legend: B batch, F feature dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

from ..errors import UserError

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureMoments:
    """Count, mean and centred sum of squares of feature vectors.

    Centred sums are merged with the parallel rule of Chan, Golub & LeVeque (1979), so that neither the
    batch size nor the number of workers affects the precision.
    """

    count: int
    mean_F: Float64
    scatter_FF: Float64

    @classmethod
    def empty(cls, dim: int) -> FeatureMoments:
        """The moments of no images, of `dim` features."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features_BF: Tensor | NDArray[np.floating]) -> FeatureMoments:
        """The moments of one batch, [B, F].

        Raises:
            UserError: the features hold NaN or infinity.
        """
        if isinstance(features_BF, Tensor):
            features_BF = features_BF.detach().cpu().numpy()
        features_BF = np.asarray(features_BF, dtype=np.float64)
        if not np.isfinite(features_BF).all():
            raise UserError("the features of some images are NaN or infinite; check the images and the weights")
        count, dim = features_BF.shape
        if count == 0:
            return cls.empty(dim)
        mean_F = features_BF.mean(axis=0)
        centred_BF = features_BF - mean_F
        return cls(count, mean_F, centred_BF.T @ centred_BF)

    def update(self, features_BF: Tensor, index_B: Tensor, /) -> FeatureMoments:
        """Add one batch of features."""
        return self.merge(FeatureMoments.of(features_BF))

    def merge(self, other: FeatureMoments, /) -> FeatureMoments:
        """The moments of the union of both sets of features."""
        if self.mean_F.shape != other.mean_F.shape:
            raise UserError(
                f"features of {self.mean_F.size} and of {other.mean_F.size} numbers cannot be compared; "
                "use one extractor for both"
            )
        count = self.count + other.count
        if count == 0:
            return self
        shift_F = other.mean_F - self.mean_F
        mean_F = self.mean_F + shift_F * (other.count / count)
        between_FF = np.outer(shift_F, shift_F)
        between_FF *= self.count * other.count / count
        between_FF += self.scatter_FF + other.scatter_FF
        return FeatureMoments(count, mean_F, between_FF)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Count, mean [F] and scatter [F, F], for `from_arrays`."""
        return {"count": np.array([self.count]), "mean": self.mean_F, "scatter": self.scatter_FF}

    def from_arrays(self, arrays: dict[str, NDArray[np.generic]]) -> FeatureMoments:
        """The moments with these arrays. Raises ValueError if they are not of as many features."""
        mean_F, scatter_FF = arrays["mean"].astype(np.float64), arrays["scatter"].astype(np.float64)
        if mean_F.shape != self.mean_F.shape or scatter_FF.shape != self.scatter_FF.shape:
            raise ValueError("these are no moments of as many features")
        return FeatureMoments(int(arrays["count"].item()), mean_F, scatter_FF)

    @cached_property
    def root_FF(self) -> Float64:
        """R with R R^T = the covariance. It is kept: every distance to these moments needs it."""
        return _root(self.covariance_FF())

    def covariance_FF(self) -> Float64:
        """The unbiased covariance, as in the published FID.

        Raises:
            UserError: fewer than two feature vectors.
        """
        if self.count < 2:
            raise UserError(f"a Fréchet distance needs at least 2 images on each side, not {self.count}")
        return self.scatter_FF / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017, Eq. 6.

    With S = R R^T the trace of the root is the nuclear norm of R_a^T R_b.  It takes only symmetric
    eigenproblems and singular values, stays real and has no divisions; singular covariances (fewer
    images than features) need no added diagonal, as they do with `sqrtm`.

    Raises:
        UserError: fewer than two images on a side, or features of different size.
    """
    if a.mean_F.shape != b.mean_F.shape:
        a.merge(b)  # raises the error
    covariance_a_FF, covariance_b_FF = a.covariance_FF(), b.covariance_FF()
    shift_F = a.mean_F - b.mean_F
    # LAPACK's many small steps: on a busy machine two threads take five times as long. Other libraries keep their
    # threads, as a training may go on beside this.
    with ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        cross = scipy.linalg.svdvals(a.root_FF.T @ b.root_FF).sum()
    distance = shift_F @ shift_F + np.trace(covariance_a_FF) + np.trace(covariance_b_FF) - 2.0 * cross
    return max(float(distance), 0.0)


def _root(covariance_FF: Float64) -> Float64:
    """R with R R^T = S.  Eigenvalues below rounding are zero: their roots would be noise of size 1e-8."""
    value_F, vector_FF = scipy.linalg.eigh(covariance_FF)
    floor = value_F[-1] * value_F.size * np.finfo(np.float64).eps
    root_F = np.sqrt(np.where(value_F > floor, value_F, 0.0))
    return vector_FF * root_F
