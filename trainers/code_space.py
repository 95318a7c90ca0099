"""What stage 1 has made of the codes so far: how far they have moved, and how they are organised.

Measured at the end of every epoch on at most `SAMPLE` rows, evenly spaced over the data set, so that the cost does not
grow with it: each worker contributes the codes and images of its own rows, and all of them see the same sample. Where a
row started is a function of the seed, so no second table is kept.

Shapes: K rows of the sample, k those of this worker, D latent dimension, F numbers of an image, n neighbours.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from ..cluster.latent_rates import latent_lr
from ..cluster.latent_shard import first_codes
from ..cluster.latents import LatentTable
from ..config.run import Config
from ..config.sections import GloConfig
from ..datasets.reader import CorruptImage, ImageRows
from ..models.comm import all_sum
from ..models.organisation import agreement, effective_dimension, nearest_images, small_images, turned

SAMPLE = 2048
EARLY = 0.2  # share of the epochs after which codes should have moved
LEAST_EPOCHS = 5  # a shorter run is a trial
STILL = 20.0  # degrees; measured in docs/quality.md


class CodeSpace:
    """Measures of the codes of a run on a fixed sample of its rows. All methods are collective."""

    def __init__(self, config: Config, images: ImageRows, latents: LatentTable, device: torch.device) -> None:
        self.config, self.images, self.latents, self.device = config, images, latents, device
        size = min(SAMPLE, len(images))
        self.rows_K = np.arange(size) * len(images) // size
        self.own_k = np.flatnonzero((self.rows_K >= latents.rows.start) & (self.rows_K < latents.rows.stop))
        self.first_KD = first_codes(config.seed, torch.from_numpy(self.rows_K), config.generator.latent_dim)
        self.near: tuple[Tensor, Tensor] | None = None  # found at the end of the first epoch

    def at_the_end_of(self, epoch: int) -> tuple[dict[str, float], str]:
        """The measures after an epoch, counted from 0, and a warning if there is one."""
        found = self.facts()
        return found, still(self.config.glo, len(self.images), epoch + 1, found["code_angle"])

    def facts(self) -> dict[str, float]:
        """`code_angle` in degrees, `code_dimension`, and, with images, `code_agreement` and its value by chance."""
        z_KD = self._of_all(self.latents.gather(self.rows_K[self.own_k])).cpu()
        found = {
            "code_angle": float(turned(z_KD, self.first_KD).mean()),
            "code_dimension": effective_dimension(z_KD),
        }
        if self.near is None:
            self.near = self._near_images()
        read_J, near_Jn = self.near
        if len(read_J) > 2:
            found["code_agreement"] = agreement(z_KD[read_J], near_Jn)
            found["code_agreement_by_chance"] = near_Jn.shape[1] / (len(read_J) - 1)
        return found

    def _near_images(self) -> tuple[Tensor, Tensor]:
        """Places in the sample of the images that can be read [J], and the nearest of these to each [J, n]."""
        index = self.images.index
        size = small_images(torch.zeros(1, index.channels, index.resolution, index.resolution)).shape[1]
        own_kF = torch.full((len(self.own_k), size), torch.nan)
        for place, row in enumerate(self.rows_K[self.own_k].tolist()):
            with suppress(CorruptImage):  # counted and reported by the loader
                own_kF[place] = small_images(torch.from_numpy(self.images.decode(row).copy())[None])[0]
        x_KF = self._of_all(own_kF).cpu()
        read_J = x_KF.isfinite().all(1).nonzero()[:, 0]
        return read_J, nearest_images(x_KF[read_J]) if len(read_J) > 2 else torch.zeros(0, 0, dtype=torch.int64)

    def _of_all(self, own: Tensor) -> Tensor:
        """The rows [K, ...] of the whole sample, from those of every worker; adding zeros changes no bit."""
        whole = torch.zeros(len(self.rows_K), own.shape[1], device=self.device)
        whole[torch.from_numpy(self.own_k).to(self.device)] = own.to(self.device)
        return all_sum(whole)


def still(glo: GloConfig, rows: int, epoch: int, angle: float) -> str:
    """The warning after `epoch` epochs (counted from 1) for codes that have turned by `angle` degrees; mostly empty.

    It comes once, after a fifth of the epochs.
    """
    due = max(1, round(EARLY * glo.epochs))
    if glo.epochs < LEAST_EPOCHS or epoch != due or angle >= STILL:
        return ""
    advice = "raise glo.latent_lr"
    if glo.latent_optimizer == "adam" and glo.bounds_movement:
        rule = latent_lr(glo.model_copy(update={"latent_lr": "auto"}), rows)
        if rule > latent_lr(glo, rows):
            advice = f"set glo.latent_lr=auto ({rule:.2g})"
    return (
        f"the codes have hardly moved: {angle:.0f} degrees from their random start after {epoch} of {glo.epochs} "
        f"epochs, where {STILL:.0f} or more are usual, so samplers will fit noise; {advice} or train for more epochs"
    )
