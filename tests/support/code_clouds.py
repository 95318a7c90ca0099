"""Small sets of codes, samplers fitted to them in this process, and how well draws cover the modes.

Shapes: N rows, B draws, M modes, 2 dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from glann.config.samplers import SAMPLERS
from glann.models.noise import Stream, noise
from glann.samplers.base import Codes, FitStep, Sampler, build_sampler
from torch import Tensor

CPU = torch.device("cpu")
SHRUNK = 1 / 3.2  # both clouds in the unit ball
DRAWS = 2500


def ring() -> tuple[Tensor, float]:
    """Centres of 8 Gaussians on a ring of radius 2, and their standard deviation."""
    angle_M = 2 * math.pi * torch.arange(8) / 8
    return 2 * torch.stack([angle_M.cos(), angle_M.sin()], 1), 0.02


def grid() -> tuple[Tensor, float]:
    """Centres of 25 Gaussians on a grid from -2 to 2, and their standard deviation."""
    return torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3)), 0.05


CLOUDS = {"ring": ring, "grid": grid}


def cloud(name: str, rows: int) -> Tensor:
    """Codes z_N2 of a cloud, equally many of each mode, in the unit ball."""
    centre_M2, deviation = CLOUDS[name]()
    generator = torch.Generator().manual_seed(5)
    spread_N2 = deviation * torch.randn(rows, 2, generator=generator)
    return (centre_M2[torch.arange(rows) % len(centre_M2)] + spread_N2) * SHRUNK


def covered(sampler: Sampler, name: str) -> tuple[int, float]:
    """`modes_covered` by 2,500 draws of a sampler."""
    e_BE = noise(0, 7, torch.arange(DRAWS), sampler.network.noise_dim, stream=Stream.SAMPLES)
    return modes_covered(sampler.codes(e_BE) / SHRUNK, name)


def modes_covered(drawn_B2: Tensor, name: str) -> tuple[int, float]:
    """Modes that a draw comes within 3 standard deviations of, and the share of draws that do."""
    centre_M2, deviation = CLOUDS[name]()
    distance_B, mode_B = torch.cdist(drawn_B2, centre_M2).min(1)
    good_B = distance_B < 3 * deviation
    return len(set(mode_B[good_B].tolist())), float(good_B.float().mean())


def build(kind: str, dim: int, codes_on: str = "ball", seed: int = 3, state: Any = None, **keys: Any) -> Sampler:
    """A sampler of a kind with these keys, its weights drawn from the same random numbers every time."""
    torch.manual_seed(1)
    config = SAMPLERS[kind].model_validate({"kind": kind} | keys)
    return build_sampler(config, dim, codes_on, seed=seed, device=CPU, state=state)  # type: ignore[arg-type]


def steps(sampler: Sampler, z_ND: Tensor, first_epoch: int = 0, until: int | None = None) -> list[FitStep]:
    """The steps of a fit in this process, up to the end of epoch `until`."""
    done = []
    for step in sampler.fit(Codes(z_ND, range(len(z_ND)), len(z_ND)), first_epoch, lambda: torch.tensor([1.0, 0.0])):
        done.append(step)
        if step.epoch_facts is not None and step.epoch + 1 == until:
            break
    return done


def fitted(kind: str, z_ND: Tensor, **keys: Any) -> Sampler:
    """A sampler of a kind, fitted to codes."""
    sampler = build(kind, z_ND.shape[1], **keys)
    steps(sampler, z_ND)
    return sampler
