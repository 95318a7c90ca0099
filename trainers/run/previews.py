"""Pictures while training, drawn on rank 0 from whole weights and sent to the driver as arrays.

Shapes: P pictures, H W C height, width, channels, D latent dimension, n rows of this worker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cluster.latents import LatentTable
from ...config.run import Config
from ...datasets.reader import CorruptImage, ImageRows
from ...inference.model import SamplingModel
from ...models.generators import build_generator
from ...models.mapping import build_mapping
from ...samplers.gaussian import gaussian

PREVIEW_SEED = 0  # the same codes every time, so that pictures of different epochs can be compared


class Previews:
    """Fixed rows and fixed noise, drawn again as training goes on."""

    def __init__(self, config: Config, images: ImageRows, rows: range, device: torch.device) -> None:
        self.config, self.images, self.device = config, images, device
        wanted = min(config.preview.images // 2, len(rows))
        self.rows = [rows[number * len(rows) // wanted] for number in range(wanted)]  # evenly over this worker's
        self.first = rows.start

    def glo(self, weights: dict[str, Tensor], latents: LatentTable) -> dict[str, np.ndarray]:
        """Reconstructions (pairs [P, 2, H, W, C]: image, G(z)) and samples from the Gaussian of this worker's codes."""
        codes_nD = latents.codes()
        model = self._model(weights, gaussian(codes_nD))
        pairs = []
        for row in self.rows:
            try:
                real = self.images.decode(row).transpose(1, 2, 0)
            except CorruptImage:  # the loader has counted and named it
                continue
            pairs.append([real, model.decode(codes_nD[row - self.first][None])[0]])
        samples = model.sample(self.config.preview.images, PREVIEW_SEED, method="glo")
        return {"reconstructions": np.array(pairs), "samples": samples}

    def imle(self, weights: dict[str, Tensor], mapping: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Samples G(T(e)) [P, H, W, C]."""
        dim = self.config.generator.latent_dim
        model = self._model(weights, {"mean": torch.zeros(dim), "root": torch.eye(dim)}, mapping)
        return {"samples": model.sample(self.config.preview.images, PREVIEW_SEED)}

    def _model(
        self, weights: dict[str, Tensor], codes: dict[str, Tensor], mapping: dict[str, Tensor] | None = None
    ) -> SamplingModel:
        config = self.config
        generator = build_generator(config.generator, config.data.resolution, config.data.channels)
        generator.load_state_dict(weights)
        network: Any = None
        if mapping is not None:
            network = build_mapping(config.imle, config.generator.latent_dim, config.glo.constraint)
            network.load_state_dict(mapping)
            network.to(self.device)
        return SamplingModel(
            generator.to(self.device),
            network,
            codes["mean"],
            codes["root"],
            config.imle.noise_dim,
            config.glo.constraint,
        )
