"""What a generator is refined by whose images have codes: AE-OT-GAN (An et al. 2020).

The generator starts as the decoder of an autoencoder, and draws the codes of the sampler that was fitted to those of
the images. Beside the critic's objective its loss has two terms: the reconstruction loss of rows that carry the code of
their image (content), and the distance of a code to the one that the encoder gives its image (encoder features). The
encoder, the codes and the sampler stay as they are.

Shapes: B rows of this worker's batch, D latent dimension, C, H, W channels, height, width, P paired rows, K sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cluster.latents import LatentTable
from ..config.networks import NetworksConfig
from ..config.run import Config
from ..models.encoders import Encoder, Posterior, encoder_of
from ..models.generators import Generator, generator_of
from ..models.mapping import NoiseToCode
from ..models.patches import patch_seeds
from ..samplers.base import build_network
from .engine.step import StepResult
from .glo import GENERATOR
from .objective import Objective
from .sampler import MAPPING
from .stage import ENCODER, StageContext, State, final_weights

SUMS = 4  # of a generator's step: paired rows and their content, all rows and the squared distances of their codes


@dataclass(frozen=True, eq=False)
class Refinement:
    """The parts that do not change. latents: the codes of this worker's images. loss: of content."""

    config: Config
    sampler: NoiseToCode
    encoder: Encoder
    loss: Objective
    latents: LatentTable
    device: torch.device

    @classmethod
    def of(cls, context: StageContext, networks: Mapping[str, State]) -> Refinement:
        """Of the networks that earlier stages trained."""
        config, device = context.config, context.device
        sampler = build_network(config.sampler, config.generator.latent_dim, config.constraint)
        sampler.load_state_dict(networks[MAPPING]["weights"])
        encoder = encoder_of(config)
        encoder.load_state_dict(networks[ENCODER]["weights"])
        frozen = [network.to(device).eval().requires_grad_(False) for network in (sampler, encoder)]
        return cls(config, frozen[0], frozen[1], Objective(config, device), context.latents, device)  # type: ignore[arg-type]

    def codes_of(self, rows_B: Tensor, weight_B: Tensor) -> Tensor:
        """The codes of images, [B, D]; zeros for padding and unreadable ones."""
        real_B = weight_B > 0
        code_BD = torch.zeros(len(rows_B), self.config.generator.latent_dim)
        code_BD[real_B] = self.latents.gather(rows_B[real_B].numpy())
        return code_BD.to(self.device, non_blocking=True)

    def terms(self, real_BCHW: Tensor, code_BD: Tensor, paired_B: Tensor, epoch: int, rows_B: Tensor) -> Terms:
        """The terms of a generator's step. paired_B: which rows carry the code of their image."""
        seed_B = patch_seeds(self.config.seed, epoch, rows_B)
        return Terms(self, real_BCHW, code_BD, paired_B, seed_B, torch.zeros(SUMS, device=self.device))


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms of the loss of one step. sums_K: set while they are computed, to be summed over workers."""

    refinement: Refinement
    real_BCHW: Tensor
    code_BD: Tensor
    paired_B: Tensor
    seed_B: Tensor
    sums_K: Tensor

    def loss(self, fake_BCHW: Tensor, weight_B: Tensor, part: slice) -> Tensor:
        """Weighted terms of a slice of the batch, per row."""
        parts, keys = self.refinement, self.refinement.config.networks
        paired_P = self.paired_B[part].nonzero()[:, 0]
        content_B = fake_BCHW.new_zeros(len(fake_BCHW))
        if len(paired_P):
            content_P = parts.loss(fake_BCHW[paired_P], self.real_BCHW[part][paired_P], self.seed_B[part][paired_P])
            content_B = content_B.index_put((paired_P,), content_P)
        encoded = Posterior.of(parts.encoder(fake_BCHW), self.code_BD.shape[1])
        apart_B = (encoded.mean_BD - self.code_BD[part]).square().mean(1)
        real_B = (weight_B > 0).float()
        of_pairs_B = self.paired_B[part] * real_B
        sums = [of_pairs_B, of_pairs_B * content_B, real_B, real_B * apart_B]
        self.sums_K.add_(torch.stack([each_B.detach().sum() for each_B in sums]))
        return keys.content * rows_to_a_pair(keys) * content_B + keys.encoder_features * apart_B


def rows_to_a_pair(keys: NetworksConfig) -> float:
    """Rows to one paired row: makes the mean of their content over a batch that over its paired rows, as expected."""
    return 1 + keys.generated


def facts_of_terms(step: StepResult) -> dict[str, float]:
    """What to report of the sums of a generator's step; nothing without terms, or of a step that was withheld."""
    if len(step.piggyback_K) != SUMS or not step.applied:
        return {}
    pairs, content, rows, apart = step.piggyback_K.tolist()
    return {"encoder_features": apart / rows} | ({"content": content / pairs} if pairs else {})


def warm_start(config: Config, networks: Mapping[str, State]) -> Generator:
    """The generator as the decoder of the autoencoder left it."""
    generator = generator_of(config)
    generator.load_state_dict(final_weights(networks[GENERATOR]))
    return generator
