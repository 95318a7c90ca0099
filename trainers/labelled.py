"""The labels that a critic sees: of a batch's rows, of a few images that it learns to classify, and of held-out ones.

Shapes: B rows of this worker's batch, L labelled images, N rows of the data set, C, H, W channels, height, width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..cluster.placement import ranges
from ..config.run import Config
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..metrics.reference import held_out_images, training_images
from ..models.comm import all_sum, rank, world_size
from ..models.critics import Critic
from ..models.noise import Stream, noise, uniform
from .stage import StageStep

ACCURACY = "held_out_accuracy"


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


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out images with labels, which say after each epoch how well the critic classifies what it has not seen.

    label_N: -1 where it is not known.
    """

    config: Config
    images: ImageRows
    label_N: np.ndarray

    @classmethod
    def of(cls, config: Config, images: ImageRows) -> HeldOut | None:
        """None if nothing is classified, or there are no held-out images with labels.

        Minibatch discrimination makes a class depend on the other images of a batch, so it is not measured.
        """
        critic = config.networks.critic
        held_out = held_out_images(config, images.index) if critic.classes and not critic.kernels else None
        label_N = None if held_out is None else held_out.labels()
        return None if held_out is None or label_N is None else cls(config, held_out, label_N)

    @torch.no_grad()
    def accuracy(self, critic: Critic, device: torch.device) -> float:
        """The share of the labelled images that the critic classifies rightly. Collective."""
        part = ranges(len(self.images), world_size())[rank()]
        at, hits = part.start, torch.zeros(2, dtype=torch.float64, device=device)
        was, _ = critic.training, critic.eval()
        try:
            for img_BCHW in training_images(self.images, part, self.config):
                head_BK = critic.judge(img_BCHW.to(device).float() / 255, None).head_BQ
                label_B = torch.tensor(self.label_N[at : at + len(img_BCHW)], device=device)
                right_B = head_BK.argmax(1) == label_B
                hits += torch.stack([right_B.sum(), (label_B >= 0).sum()]).double()
                at += len(img_BCHW)
        finally:
            critic.train(was)
        right, known = all_sum(hits).tolist()
        return right / known if known else 0.0

    def measured(self, steps: Iterable[StageStep], critic: Critic, device: torch.device) -> Iterator[StageStep]:
        """The steps, with the accuracy among the facts of those that end an epoch."""
        for step in steps:
            if step.ends_epoch:
                step = replace(step, facts={**step.facts, ACCURACY: self.accuracy(critic, device)})
            yield step
