"""Preview images during training: every worker draws a part of the same images, however many workers there are.

Shapes: H W C height, width, channels, D latent dimension, n rows of this worker.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cluster.latents import LatentTable
from ..cluster.placement import ranges
from ..config.run import Config
from ..config.samplers import GaussianConfig, SamplerConfig
from ..datasets.reader import CorruptImage, ImageRows
from ..inference.model import SamplingModel
from ..metrics.evaluate import GIB
from ..metrics.judge import batches_of
from ..models.comm import rank, world_size
from ..models.generators import generator_of
from ..reports.sheets import Tile, tiles_of
from ..samplers.base import build_network
from ..samplers.gaussian import gaussian

PREVIEW_SEED = 0  # the same noise every time, so that epochs can be compared
RECONSTRUCTIONS, SAMPLES = "reconstructions", "samples"

Pictures = dict[str, dict[int, tuple[Tile, ...]]]  # this worker's part, by kind and position: (x, G(z)), or (sample,)


class Previews:
    """Previews of fixed rows of all workers and fixed noise, comparable between epochs and numbers of workers."""

    def __init__(self, config: Config, images: ImageRows, rows: range, device: torch.device) -> None:
        """`rows`: those of this worker."""
        self.config, self.images, self.rows, self.device = config, images, rows, device

    def reconstructed(self, weights: dict[str, Tensor], latents: LatentTable) -> Pictures:
        """Reconstructions, and samples from the Gaussian of all codes. Collective."""
        codes_nD = latents.codes()
        model = self._model(weights, GaussianConfig(), gaussian(codes_nD, len(self.images), self.device))
        pairs: dict[int, tuple[Tile, ...]] = {}
        for position, row in enumerate(shown_rows(len(self.images), self.config.preview.images // 2)):
            if row not in self.rows:
                continue
            try:
                real = self.images.decode(row).transpose(1, 2, 0)
            except CorruptImage:  # already counted and reported by the loader
                continue
            fake = model.decode(codes_nD[row - self.rows.start][None])[0]
            pairs[position] = (Tile.of(real), Tile.of(fake))
        return {RECONSTRUCTIONS: pairs, SAMPLES: self._samples(model)}

    def sampled(self, weights: dict[str, Tensor], sampler: dict[str, Tensor]) -> Pictures:
        """Samples by the configured sampler with these weights."""
        return {SAMPLES: self._samples(self._model(weights, self.config.sampler, sampler))}

    def _samples(self, model: SamplingModel) -> dict[int, tuple[Tile, ...]]:
        part = ranges(self.config.preview.images, world_size())[rank()]
        return dict(zip(part, ((tile,) for tile in sample_tiles(model, part, PREVIEW_SEED)), strict=True))

    def _model(
        self, weights: dict[str, Tensor], sampler: SamplerConfig, sampler_weights: dict[str, Tensor]
    ) -> SamplingModel:
        config = self.config
        generator = generator_of(config)
        generator.load_state_dict(weights)
        network = build_network(sampler, config.generator.latent_dim, config.constraint)
        network.load_state_dict(sampler_weights)
        memory = int(config.evaluation.memory_gb * GIB)
        return SamplingModel(generator.to(self.device), {sampler.kind: network}, sampler.kind, memory=memory)


def shown_rows(rows: int, count: int) -> list[int]:
    """The rows that previews reconstruct: at most `count`, evenly spaced over the rows of all workers."""
    count = min(count, rows)
    return [number * rows // count for number in range(count)]


def sample_tiles(model: SamplingModel, part: range, seed: int) -> list[Tile]:
    """The tiles of consecutive images of a seed."""
    tiles = []
    for index_B in batches_of(part):
        tiles += tiles_of(model.decode(model.codes(model.noise(index_B, seed))))
    return tiles
