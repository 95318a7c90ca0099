"""Counter-based Gaussian noise: row i is a function of (seed, stream, epoch, i) only.

Any worker can generate any row from its index, so noise is never sent or stored. The generator is
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in torch
integer arithmetic, followed by the Box-Muller transform in float64.

Legend: B requested rows, E noise dimension, K blocks of four 32-bit words.
"""

from __future__ import annotations

import math
import zlib
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK_BLOCKS = 1 << 14  # so that the two dozen int64 temporaries of a chunk fit in the cache


class Stream(IntEnum):
    """Separate uses of noise; equal indices in different streams are independent."""

    LATENTS = 0
    CANDIDATES = 1
    SAMPLES = 2
    TRAINING = 3  # random numbers of a step of training, beside the candidates
    CODES = 4  # noise on the codes of stage 1
    PRIOR = 5  # noise that a generator draws its training images from
    PENALTY = 6  # where a critic's slope is measured
    STATISTICS = 7  # noise that stands for all of a prior
    LABELLED = 8  # which labelled image accompanies a row
    POSTERIOR = 9  # codes that an encoder's distribution gives
    PAIRED = 10  # which rows of a batch carry the codes of their images


# The numbers that these kinds had before streams were named; changing them would change the images of every seed.
_FIRST_KINDS = {"imle": 0, "gaussian": 1}


def stream_of(kind: str) -> int:
    """The `epoch` of `Stream.SAMPLES` from which a kind of sampler draws; a function of its name only."""
    return _FIRST_KINDS.get(kind, zlib.crc32(kind.encode()))


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 random bits for each counter.

    Args:
        counter: four int64 tensors of one shape, with values in [0, 2**32).
        key: two words in [0, 2**32).
    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply(c0, _MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def noise(
    seed: int,
    epoch: int | Tensor,
    index_B: Tensor | np.ndarray,
    dim: int,
    device: str | torch.device = "cpu",
    stream: Stream = Stream.CANDIDATES,
) -> Tensor:
    """Standard normal noise e_BE, float32, one row per index.

    Args:
        seed, epoch: in [0, 2**32); the epoch is one for all rows, or an int64 [B] of them.
        index_B: row indices, any order, repeats allowed, in [0, 2**63).
        dim: E.
        stream: the use of the noise.
    Returns:
        [B, E] float32 on `device`. The random words are the same everywhere; the last bit of a float may
        differ between processors, whose log and cos round differently.
    Raises:
        ValueError: an argument is out of range.
    """
    index_B = torch.as_tensor(index_B, dtype=torch.int64)
    epoch_B = torch.as_tensor(epoch, dtype=torch.int64).expand(len(index_B))
    # Checked where they are, as a rule on the CPU: reading them on a device would wait for it.
    if not 0 <= seed <= _MASK or (len(epoch_B) and not 0 <= int(epoch_B.min()) <= int(epoch_B.max()) <= _MASK):
        raise ValueError(f"seed {seed} and epoch {epoch} must be in [0, 2**32)")
    if index_B.numel() and int(index_B.min()) < 0:
        raise ValueError("indices of noise rows must not be negative")
    unwaited = torch.device(device).type != "cpu"
    index_B, epoch_B = index_B.to(device, non_blocking=unwaited), epoch_B.to(device, non_blocking=unwaited)
    blocks = -(-dim // 4)
    e_BE = torch.empty(len(index_B), dim, dtype=torch.float32, device=index_B.device)
    block_K = torch.arange(blocks, dtype=torch.int64, device=index_B.device)
    # Few launches are faster on accelerators, chunks that fit the cache on a CPU.
    rows = max(1, (_CHUNK_BLOCKS if index_B.device.type == "cpu" else 64 * _CHUNK_BLOCKS) // blocks)
    for at in range(0, len(index_B), rows):
        index_C1 = index_B[at : at + rows, None].expand(-1, blocks)
        epoch_C1 = epoch_B[at : at + rows, None].expand(-1, blocks)
        counter = (index_C1 & _MASK, index_C1 >> 32, block_K.expand_as(index_C1), epoch_C1)
        words = philox4x32(counter, (seed, int(stream)))
        normal_CE = torch.stack([*_box_muller(*words[:2]), *_box_muller(*words[2:])], dim=2).flatten(1)
        e_BE[at : at + rows] = normal_CE[:, :dim]
    return e_BE


def uniform(e_B: Tensor) -> Tensor:
    """The share of N(0, 1) below each number, float64, in (0, 1)."""
    return normal_share(e_B.double()).clamp(2.0**-60, 1 - 2.0**-53)


def normal_share(x: Tensor) -> Tensor:
    """The distribution function of N(0, 1) with a small relative error also far below 0, where torch's is zero."""
    return 0.5 * torch.erfc(x * -(0.5**0.5))


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product.

    int64 wraps modulo 2**64, which leaves all 64 bits of the unsigned product in place.
    """
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def _box_muller(word_a: Tensor, word_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals from two words; the half keeps the uniform away from zero."""
    radius = word_a.double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = word_b.double().mul_(2.0 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()
