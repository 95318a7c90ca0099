"""Penalties on the gradient of a critic with respect to images, per row.

They need the gradient of each row's own score. With BatchNorm a score depends on the whole batch, so there is none, and
the configuration refuses the combination.

Shapes: B batch, C, H, W channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .noise import Stream, noise, uniform

Critic = Callable[[Tensor], Tensor]  # images -> score_B
AROUND = 0.5  # of DRAGAN: largest noise, in standard deviations of an image


def penalty(
    kind: str, critic: Critic, real_BCHW: Tensor, fake_BCHW: Tensor, seed: int, epoch: int, rows_B: Tensor
) -> Tensor:
    """The penalty of every row, [B].

    Args:
        kind: `between` (WGAN-GP), `around` (DRAGAN), `r1`, `r2`, or `r1-r2`.
        seed, epoch, rows_B: what the points of `between` and `around` are functions of.
    """
    if kind == "between":
        return one_centred(critic, between(real_BCHW, fake_BCHW, seed, epoch, rows_B))
    if kind == "around":
        return one_centred(critic, around(real_BCHW, seed, epoch, rows_B))
    at = {"r1": (real_BCHW,), "r2": (fake_BCHW,), "r1-r2": (real_BCHW, fake_BCHW)}[kind]
    return torch.stack([zero_centred(critic, img_BCHW) for img_BCHW in at]).sum(0)


def one_centred(critic: Critic, at_BCHW: Tensor) -> Tensor:
    """(|grad D| - 1)^2, per row. Source: Gulrajani et al. 2017, Eq. 3."""
    return (slope(critic, at_BCHW) - 1).square()


def zero_centred(critic: Critic, at_BCHW: Tensor) -> Tensor:
    """1/2 |grad D|^2, per row: R1 at real images and R2 at generated ones. Source: Mescheder et al. 2018, Eq. 9, 10."""
    return 0.5 * slope(critic, at_BCHW).square()


def slope(critic: Critic, at_BCHW: Tensor) -> Tensor:
    """|grad D| at images, per row, differentiable with respect to the critic's parameters."""
    with torch.enable_grad():
        at_BCHW = at_BCHW.detach().requires_grad_()
        (grad_BCHW,) = torch.autograd.grad(critic(at_BCHW).sum(), at_BCHW, create_graph=True)
        return torch.linalg.vector_norm(grad_BCHW.flatten(1), dim=1)


def between(real_BCHW: Tensor, fake_BCHW: Tensor, seed: int, epoch: int, rows_B: Tensor) -> Tensor:
    """A uniform point on the line from each generated image to the real one (Gulrajani et al. 2017, Algorithm 1)."""
    share_B = random_shares(1, real_BCHW, seed, epoch, rows_B)
    return torch.lerp(fake_BCHW, real_BCHW, share_B.view(-1, *[1] * (real_BCHW.dim() - 1)))


def around(real_BCHW: Tensor, seed: int, epoch: int, rows_B: Tensor) -> Tensor:
    """A uniform point on the line from each real image to a noisy one, by uniform noise of half a standard deviation.

    Source: Kodali et al. 2017 (DRAGAN), Algorithm 1, with the noise of compare_gan. There the deviation is that of the
    batch; here it is the image's own, so that a row does not depend on the others.
    """
    flat_BP = real_BCHW.flatten(1)
    share_BQ = random_shares(1 + flat_BP.shape[1], real_BCHW, seed, epoch, rows_B)
    noise_BP = AROUND * flat_BP.std(1, keepdim=True) * share_BQ[:, 1:]
    return (flat_BP + share_BQ[:, :1] * noise_BP).view_as(real_BCHW)


def random_shares(count: int, like: Tensor, seed: int, epoch: int, rows_B: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), [B, count]; functions of (seed, epoch, row)."""
    return uniform(noise(seed, epoch, rows_B, count, like.device, Stream.PENALTY)).to(like.dtype)
