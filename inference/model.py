"""Sampling from a trained model: x = G(z), where a sampler maps normal noise e to the code z.

Image i of seed s of a kind of sampler is always the same image: its noise is a function of (kind, s, i) alone, the
networks are in eval mode, and nothing depends on how the images are cut into batches.

Legend: B batch, N images, P pairs, S steps, D latent dimension, E noise dimension, H W pixels, C channels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config.parse import shown
from ..errors import UserError
from ..models.cost import inference_bytes
from ..models.mapping import NoiseToCode
from ..models.noise import Stream, noise, stream_of

Images = NDArray[np.uint8]
DEFAULT_BATCH = 64  # images in memory at once as results, and at most decoded at once
DECODE_BYTES = 2 << 30
OLD_NAMES = {"glo": "gaussian"}  # kinds by their names in `method`


def usable_device(device: torch.device | str) -> torch.device:
    """The device to compute on: `cpu`, `cuda`, `cuda:N`, or `auto`: the first GPU, where there is one.

    Raises:
        UserError: another device, or one that this machine, or this torch, does not have.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(?:cpu|cuda(?::([0-9]{1,4}))?)", str(device))
    if match is None:
        raise UserError(
            f"--device {shown(str(device))} is not possible; use auto, cpu, cuda, or cuda:1 for the second GPU"
        )
    if str(device) == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError(
            f"--device {device}: this machine has no CUDA device (torch {torch.__version__}); use --device cpu"
        )
    if int(match[1] or 0) >= count:
        raise UserError(f"--device {device}: this machine has {count} CUDA devices; the last is cuda:{count - 1}")
    return torch.device(device)


@dataclass(eq=False)
class SamplingModel:
    """G and its samplers by kind, in eval mode.

    `own` is the kind that the model was trained with; `source` is the origin of the model, for messages; `memory` is
    what G may take on its device, in bytes: as many images are decoded at once as fit, and always one.
    """

    generator: nn.Module
    samplers: dict[str, NoiseToCode]
    own: str = "imle"
    source: str = "this model"
    memory: int = DECODE_BYTES

    def __post_init__(self) -> None:
        for network in (self.generator, *self.samplers.values()):
            network.eval().requires_grad_(False)
        self.device = next(self.generator.parameters()).device
        for network in self.samplers.values():
            network.to(self.device)

    @property
    def resolution(self) -> int:
        """Side of its images, in pixels."""
        return int(self.generator.resolution)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        """Channels of its images: 1 or 3."""
        return int(self.generator.channels)  # type: ignore[arg-type]

    @cached_property
    def fitting(self) -> int:
        """How many images G can decode at once within `memory`; at least 1."""
        needed = inference_bytes(self.generator, (int(self.generator.latent_dim),))  # type: ignore[arg-type]
        return max(1, self.memory // max(1, needed))

    def sample(
        self,
        n: int,
        seed: int = 0,
        truncation: float = 1.0,
        sampler: str | None = None,
        batch: int = DEFAULT_BATCH,
        method: str | None = None,
    ) -> Images:
        """The first n images of a seed, uint8 [n, H, W, C].

        Args:
            truncation: factor of the noise. 1 samples the model's distribution; less stays near its mode, trading
                variety for quality; 0 gives the same image every time.
            sampler: kind of the sampler of the codes; None is the model's own, "gaussian" the baseline.
            method: the old name of `sampler`.
        Raises:
            UserError: an argument out of range, or a sampler that the model does not have.
        """
        _require(n >= 1, f"n={n} images cannot be drawn; use at least 1")
        return np.concatenate(list(self.stream(n, seed, truncation, _either(sampler, method), batch)))

    def stream(
        self,
        n: int,
        seed: int = 0,
        truncation: float = 1.0,
        sampler: str | None = None,
        batch: int = DEFAULT_BATCH,
    ) -> Iterator[Images]:
        """The images of `sample` in batches, for more of them than fit in memory."""
        _require(batch >= 1, f"batch={batch} is not possible; use at least 1")
        for start in range(0, n, batch):
            index_B = torch.arange(start, min(start + batch, n))
            yield self.decode(self.codes(self.noise(index_B, seed, sampler) * _checked(truncation), sampler))

    def interpolate(
        self,
        pairs: Sequence[tuple[int, int]],
        steps: int,
        seed: int = 0,
        truncation: float = 1.0,
        sampler: str | None = None,
        method: str | None = None,
    ) -> Images:
        """Interpolate from image a to image b of a seed for each pair (a, b); uint8 [P, S, H, W, C], ends included.

        The path is a great circle in noise space, and the norm is interpolated linearly between the
        ends. High-dimensional noise has nearly constant norm: a straight line would pass through norms
        that the sampler was not trained on.
        """
        batches = self.stream_interpolations(pairs, steps, seed, truncation, _either(sampler, method))
        images = np.concatenate(list(batches))
        return images.reshape(len(pairs), steps, *images.shape[1:])

    def stream_interpolations(
        self,
        pairs: Sequence[tuple[int, int]],
        steps: int,
        seed: int = 0,
        truncation: float = 1.0,
        sampler: str | None = None,
        batch: int = DEFAULT_BATCH,
    ) -> Iterator[Images]:
        """The images of `interpolate` in batches uint8 [B, H, W, C], pair by pair, for more than fit in memory."""
        _require(steps >= 2, f"steps={steps} is not possible; an interpolation has at least its 2 ends")
        _require(len(pairs) >= 1, "no pairs of images were given to interpolate between")
        _require(batch >= 1, f"batch={batch} is not possible; use at least 1")
        ends_P2 = torch.tensor(pairs, dtype=torch.int64)
        share_S = torch.linspace(0.0, 1.0, steps)
        for start in range(0, len(pairs) * steps, batch):
            index_B = torch.arange(start, min(start + batch, len(pairs) * steps))
            from_B, to_B = ends_P2[index_B // steps].unbind(1)
            share_B1 = share_S[index_B % steps, None].to(self.device)
            path_BE = slerp(self.noise(from_B, seed, sampler), self.noise(to_B, seed, sampler), share_B1)
            yield self.decode(self.codes(path_BE * _checked(truncation), sampler))

    def noise(self, index_B: Tensor, seed: int, sampler: str | None = None) -> Tensor:
        """The noise e_BE behind images `index_B` of a seed."""
        kind, network = self._sampler(sampler)
        _require(0 <= seed < 2**32, f"seed={seed} is not possible; use 0 to {2**32 - 1}")
        _require(bool((index_B >= 0).all()), "image indices must not be negative; they count from 0")
        return noise(seed, stream_of(kind), index_B, network.noise_dim, device=self.device, stream=Stream.SAMPLES)

    @torch.inference_mode()
    def codes(self, noise_BE: Tensor, sampler: str | None = None) -> Tensor:
        """Map noise to latent codes z_BD."""
        return self._sampler(sampler)[1](noise_BE)

    def _sampler(self, name: str | None) -> tuple[str, NoiseToCode]:
        """The kind and the network of the named sampler, or of the model's own."""
        kind = self.own if name is None else OLD_NAMES.get(name, name)
        if kind not in self.samplers:
            others = ", ".join(self.samplers)
            missing = " (stage 2 was not trained)" if kind == self.own else ""
            raise UserError(f"{self.source} has no sampler {kind[:100]!r}{missing}; it has {others}")
        return kind, self.samplers[kind]

    def decode(self, z_BD: Tensor) -> Images:
        """G(z): uint8 [B, H, W, C]."""
        parts = [self._decode(part_BD) for part_BD in z_BD.split(self.fitting)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @torch.inference_mode()
    def _decode(self, z_BD: Tensor) -> Images:
        img_BCHW = self.generator(z_BD.to(self.device)).float().clamp(0, 1)
        return (img_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation along the last axis (Shoemake 1985), with linearly interpolated norms.

    Parallel and antiparallel ends have no unique great circle and are interpolated linearly.
    """
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(a.dtype).tiny
    unit_a, unit_b = a / length_a.clamp(min=tiny), b / length_b.clamp(min=tiny)
    angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    degenerate = sine < 1e-4
    safe = torch.where(degenerate, torch.ones_like(sine), sine)
    along = (((1 - share) * angle).sin() * unit_a + (share * angle).sin() * unit_b) / safe
    curved = along * ((1 - share) * length_a + share * length_b)
    return torch.where(degenerate, (1 - share) * a + share * b, curved)


def _either(sampler: str | None, method: str | None) -> str | None:
    if method is not None:
        warnings.warn("method= is now called sampler=, and glo is now gaussian", DeprecationWarning, stacklevel=3)
    return method if sampler is None else sampler


def _checked(truncation: float) -> float:
    _require(0.0 <= truncation <= 10.0, f"truncation={truncation} is not possible; use 0 to 1 (at most 10)")
    return float(truncation)


def _require(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)
