"""Preview images during training, computed on rank 0 from whole weights and sent to the driver as arrays.

Shapes: P pictures, H W C height, width, channels, D latent dimension, n rows of this worker.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..cluster.latents import LatentTable
from ..config.run import Config
from ..config.samplers import GaussianConfig, SamplerConfig
from ..datasets.reader import CorruptImage, ImageRows
from ..inference.model import SamplingModel
from ..models.generators import generator_of
from ..samplers.base import build_network
from ..samplers.gaussian import gaussian

PREVIEW_SEED = 0  # the same noise every time, so that epochs can be compared


class Previews:
    """Previews of fixed rows and fixed noise, comparable between epochs."""

    def __init__(self, config: Config, images: ImageRows, rows: range, device: torch.device) -> None:
        self.config, self.images, self.device = config, images, device
        wanted = min(config.preview.images // 2, len(rows))
        self.rows = [rows[number * len(rows) // wanted] for number in range(wanted)]  # evenly spaced
        self.first = rows.start

    def reconstructed(self, weights: dict[str, Tensor], latents: LatentTable) -> dict[str, np.ndarray]:
        """Reconstructions (pairs [P, 2, H, W, C]: image, G(z)) and samples from the Gaussian of this worker's codes."""
        codes_nD = latents.codes()
        model = self._model(weights, GaussianConfig(), gaussian(codes_nD))
        pairs = []
        for row in self.rows:
            try:
                real = self.images.decode(row).transpose(1, 2, 0)
            except CorruptImage:  # already counted and reported by the loader
                continue
            pairs.append([real, model.decode(codes_nD[row - self.first][None])[0]])
        return {"reconstructions": np.array(pairs), "samples": model.sample(self.config.preview.images, PREVIEW_SEED)}

    def sampled(self, weights: dict[str, Tensor], sampler: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Samples [P, H, W, C] by the configured sampler with these weights."""
        model = self._model(weights, self.config.sampler, sampler)
        return {"samples": model.sample(self.config.preview.images, PREVIEW_SEED)}

    def _model(
        self, weights: dict[str, Tensor], sampler: SamplerConfig, sampler_weights: dict[str, Tensor]
    ) -> SamplingModel:
        config = self.config
        generator = generator_of(config)
        generator.load_state_dict(weights)
        network = build_network(sampler, config.generator.latent_dim, config.glo.constraint)
        network.load_state_dict(sampler_weights)
        return SamplingModel(generator.to(self.device), {sampler.kind: network}, sampler.kind)
