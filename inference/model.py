"""Drawing images from a trained model: x = G(T(e)), or G of a Gaussian fitted to the codes (the GLO baseline).

Image i of seed s is always the same image: its noise is a function of (s, i) alone, the networks are in
eval mode, and nothing depends on how the images were cut into batches.

Legend: B batch, N images, P pairs, S steps, D latent dimension, E noise dimension, H W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UserError
from ..models.noise import Stream, noise
from ..models.sphere import Constraint, project

Images = NDArray[np.uint8]
Method = Literal["imle", "glo"]
METHODS: tuple[Method, ...] = ("imle", "glo")
DEFAULT_BATCH = 64


@dataclass(eq=False)
class SamplingModel:
    """G, T and the Gaussian of the training codes, ready to draw from.

    `mean_D` and `root_DD` (root @ root.T is the covariance) describe the codes; `source` is where the
    model was read from and occurs in messages.
    """

    generator: nn.Module
    mapping: nn.Module | None
    mean_D: Tensor
    root_DD: Tensor
    noise_dim: int
    constraint: Constraint
    source: str = "this model"

    def __post_init__(self) -> None:
        for network in (self.generator, self.mapping):
            if network is not None:
                network.eval().requires_grad_(False)
        self.device = next(self.generator.parameters()).device
        self.mean_D, self.root_DD = self.mean_D.to(self.device), self.root_DD.to(self.device)

    @property
    def resolution(self) -> int:
        return int(self.generator.resolution)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        return int(self.generator.channels)  # type: ignore[arg-type]

    def sample(
        self, n: int, seed: int = 0, truncation: float = 1.0, method: Method = "imle", batch: int = DEFAULT_BATCH
    ) -> Images:
        """The first n images of a seed, uint8 [n, H, W, C].

        Args:
            truncation: factor of the noise. 1 samples the model; less keeps to its likely middle, trading
                variety for quality; 0 gives one and the same image.
            method: "imle" draws G(T(e)), Hoshen et al. 2019, Sec. 3.3; "glo" draws codes from the Gaussian.
        Raises:
            UserError: a number out of its range, or a model without the mapping that "imle" needs.
        """
        _require(n >= 1, f"n={n} images cannot be drawn; ask for at least 1")
        return np.concatenate(list(self.stream(n, seed, truncation, method, batch)))

    def stream(
        self, n: int, seed: int = 0, truncation: float = 1.0, method: Method = "imle", batch: int = DEFAULT_BATCH
    ) -> Iterator[Images]:
        """The same images a batch at a time, for more of them than memory holds."""
        _require(batch >= 1, f"batch={batch} is not possible; use at least 1")
        for start in range(0, n, batch):
            index_B = torch.arange(start, min(start + batch, n))
            yield self.decode(self.codes(self.noise(index_B, seed, method) * _checked(truncation), method))

    def interpolate(
        self,
        pairs: Sequence[tuple[int, int]],
        steps: int,
        seed: int = 0,
        truncation: float = 1.0,
        method: Method = "imle",
    ) -> Images:
        """From image a to image b of a seed for each pair (a, b); uint8 [P, S, H, W, C], ends included.

        The path is a great circle in the noise, with the length going evenly from one end's to the
        other's. Noise of many dimensions has nearly constant length: a straight line passes through
        lengths that T was never trained on, the circle stays where training was.
        """
        _require(steps >= 2, f"steps={steps} is not possible; an interpolation has at least its 2 ends")
        _require(len(pairs) >= 1, "no pairs of images were given to interpolate between")
        ends_P2 = torch.tensor(pairs, dtype=torch.int64)
        from_PE = self.noise(ends_P2[:, 0], seed, method)
        to_PE = self.noise(ends_P2[:, 1], seed, method)
        share_S = torch.linspace(0.0, 1.0, steps, device=self.device)
        path_PSE = slerp(from_PE[:, None], to_PE[:, None], share_S[None, :, None]) * _checked(truncation)
        flat = path_PSE.flatten(0, 1).split(DEFAULT_BATCH)
        images = np.concatenate([self.decode(self.codes(e_BE, method)) for e_BE in flat])
        return images.reshape(len(pairs), steps, *images.shape[1:])

    def noise(self, index_B: Tensor, seed: int, method: Method = "imle") -> Tensor:
        """The noise behind images `index_B` of a seed: e_BE for "imle", g_BD for "glo"."""
        _require(method in METHODS, f"method={method!r} is not one of {', '.join(METHODS)}")
        _require(0 <= seed < 2**32, f"seed={seed} is not possible; use 0 to {2**32 - 1}")
        _require(bool((index_B >= 0).all()), "images are counted from 0; a negative one was asked for")
        dim = self.noise_dim if method == "imle" else len(self.mean_D)
        return noise(seed, METHODS.index(method), index_B, dim, device=self.device, stream=Stream.SAMPLES)

    @torch.inference_mode()
    def codes(self, noise_BE: Tensor, method: Method = "imle") -> Tensor:
        """Latent codes z_BD of noise."""
        if method == "glo":
            return project(self.mean_D + noise_BE @ self.root_DD.T, self.constraint)
        if self.mapping is None:
            raise UserError(f"{self.source} has no mapping (stage 2 was not trained); sample with method=glo")
        return self.mapping(noise_BE)

    @torch.inference_mode()
    def decode(self, z_BD: Tensor) -> Images:
        """G(z): uint8 [B, H, W, C]."""
        img_BCHW = self.generator(z_BD.to(self.device)).float().clamp(0, 1)
        return (img_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation along the last axis (Shoemake 1985), lengths interpolated linearly.

    Ends that point the same way, or exactly apart, have no one great circle: there the line is straight.
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


def _checked(truncation: float) -> float:
    _require(0.0 <= truncation <= 10.0, f"truncation={truncation} is not possible; use 0 to 1 (at most 10)")
    return float(truncation)


def _require(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)
