"""The distribution of codes that a generator is trained with."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..cluster.placement import ranges
from ..config.run import Config
from ..config.samplers import PriorConfig
from ..models.comm import rank, world_size
from ..models.generators import Generator, generator_of
from ..models.noise import Stream, noise
from ..samplers.base import build_network
from ..samplers.prior import Prior


def prior_of(config: Config) -> Prior:
    """The distribution of codes, a function of normal noise; N(0, I) where another sampler is fitted to codes."""
    sampler = config.sampler if isinstance(config.sampler, PriorConfig) else PriorConfig()
    return cast(Prior, build_network(sampler, config.generator.latent_dim, config.constraint))


def prior_codes(config: Config, count: int) -> Tensor:
    """This worker's part of `count` codes of the prior, always the same ones."""
    return codes_numbered(config, ranges(count, world_size())[rank()])


def codes_numbered(config: Config, numbers: range) -> Tensor:
    """Some of a fixed sequence of codes of the prior."""
    prior, index_n = prior_of(config), torch.arange(numbers.start, numbers.stop)
    return prior(noise(config.seed, 0, index_n, prior.noise_dim, stream=Stream.STATISTICS))


def referenced_generator(config: Config) -> Generator:
    """The generator of a run, with random weights, and codes of the prior as its reference batch."""
    network = generator_of(config)
    if network.reference_RD is not None:
        network.reference_RD.copy_(codes_numbered(config, range(len(network.reference_RD))))
    return network
