"""Inception Score (Salimans et al. 2016) with any classifier whose name is in the metric's.

Legend: B batch, F feature dimension, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .distances import Float64


@dataclass(frozen=True, eq=False)
class ClassShares:
    """Sums over images of p(class | image) and of its logarithm's mean; `head` is the classifier's last layer.

    head: (weight [K, F], bias [K]) from features to logits.
    """

    head: tuple[Tensor, Tensor] = field(repr=False)
    count: int = 0
    share_K: Float64 = field(default_factory=lambda: np.zeros(0))
    negentropy: float = 0.0

    def update(self, features_BF: Tensor, index_B: Tensor, /) -> ClassShares:
        """Add one batch of features."""
        weight_KF, bias_K = self.head
        log_BK = (features_BF.double() @ weight_KF.double().T + bias_K.double()).log_softmax(dim=1)
        return self.merge(of_probabilities(self.head, log_BK.exp()))

    def merge(self, other: ClassShares, /) -> ClassShares:
        if not self.count or not other.count:
            return self if self.count else other
        return ClassShares(
            self.head,
            self.count + other.count,
            self.share_K + other.share_K,
            self.negentropy + other.negentropy,
        )


def of_probabilities(head: tuple[Tensor, Tensor], p_BK: Tensor) -> ClassShares:
    """The sums of one batch of class probabilities, float64 [B, K]."""
    return ClassShares(head, len(p_BK), p_BK.sum(0).numpy(), float(torch.xlogy(p_BK, p_BK).sum()))


def inception_score(drawn: ClassShares) -> float:
    """exp E KL(p(class | image) || p(class)), over all images: from 1 to the number of classes.

    Published scores are means over 10 parts of 5,000 images, which are slightly lower.

    Raises:
        UserError: no images.
    """
    if drawn.count == 0:
        raise UserError("no images were drawn, so they have no Inception Score")
    p_K = torch.from_numpy(drawn.share_K / drawn.count)
    return float(np.exp(drawn.negentropy / drawn.count - float(torch.xlogy(p_K, p_K).sum())))
