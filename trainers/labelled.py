"""The labels that a critic sees: of a batch's rows, and of a few images that it learns to classify.

Shapes: B rows of this worker's batch, L labelled images, N rows of the data set, C, H, W channels, height, width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config.run import Config
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..models.noise import Stream, noise, uniform


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with their labels, the same on every worker; float32 in [0, 1] and int64."""

    img_LCHW: Tensor
    label_L: Tensor

    def draw(self, seed: int, epoch: int, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """One of them for each row of a batch; functions of (seed, epoch, row)."""
        share_B = uniform(noise(seed, epoch, rows_B, 1, rows_B.device, Stream.LABELLED)[:, 0])
        place_B = (share_B * len(self.label_L)).long().clamp(max=len(self.label_L) - 1)
        return self.img_LCHW[place_B], self.label_L[place_B]


def labels_of(config: Config, images: ImageRows) -> np.ndarray | None:
    """The first label of every row, int32 [N]; None where nothing is trained with labels.

    Raises:
        UserError: the data have none, or others than the configuration says.
    """
    keys = config.networks
    if not (keys.condition or keys.labelled):
        return None
    label_N = images.labels()
    if label_N is None:
        raise UserError(f"{config.data.url} has no labels, which networks.condition and networks.labelled need")
    known = getattr(config.sampler, "categories", 0) if keys.condition else keys.critic.classes
    key = "sampler.categories" if keys.condition else "networks.critic.classes"
    if int(label_N.max()) >= known:
        raise UserError(f"{key}={known}, and {config.data.url} has labels up to {int(label_N.max())}; set more")
    if keys.condition and int(label_N.min()) < 0:
        raise UserError(f"{config.data.url} has images without a label, which networks.condition needs")
    return label_N


def labelled_of(config: Config, images: ImageRows, label_N: np.ndarray | None, device: torch.device) -> Labelled | None:
    """`networks.labelled` images, equally many of every class, chosen by the seed; None without the key.

    Raises:
        UserError: a class has too few.
    """
    keys = config.networks
    if not keys.labelled or label_N is None:
        return None
    each, rows = keys.labelled // keys.critic.classes, []
    for label in range(keys.critic.classes):
        of_class = np.flatnonzero(label_N == label)
        if len(of_class) < each:
            raise UserError(
                f"networks.labelled={keys.labelled} needs {each} images of label {label}; {len(of_class)} have it"
            )
        rows += np.random.default_rng((config.seed, label)).choice(of_class, each, replace=False).tolist()
    img_LCHW = np.stack([images.decode(row) for row in rows])
    return Labelled(
        torch.from_numpy(img_LCHW).to(device).float() / 255, torch.as_tensor(label_N[rows], device=device).long()
    )
