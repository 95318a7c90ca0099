"""Reconstruction losses between a generated and a real image: one float32 value per image.

Every term is a mean over the values of one image (pixels or one feature map), so terms of different
size have equal weight and an image's loss does not depend on its batch mates; likelihoods are sums.  No graph
is built for the real image.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .patches import crop
from .perceptual import FeatureNet

if TYPE_CHECKING:  # a benchmark runs this module where only torch is installed
    from ..config.sections import LossConfig

LEAST_CHANCE = 1e-7  # of a pixel's value: a saturated sigmoid must have a finite logarithm
SMALLEST_LEVEL = 4  # px; smaller copies have no useful content


class ReconstructionLoss(nn.Module):
    """loss(fake_BCHW, real_BCHW) -> loss_B, float32."""

    patch: int | None = None

    def forward(self, fake_BCHW: Tensor, real_BCHW: Tensor, patch_seed_B: Tensor | None = None) -> Tensor:
        """Loss of each image, [B]; `real_BCHW` is a constant.

        Args:
            fake_BCHW, real_BCHW: in [0, 1].
            patch_seed_B: int64 seeds of the patches' places (see `patches.patch_seeds`); needed in
                train mode if the loss was built with `patch`, unused otherwise.
        """
        raise NotImplementedError


class PixelLoss(ReconstructionLoss):
    """Mean absolute (`l1`) or squared (`l2`) difference of pixels, summed over the scales."""

    def __init__(self, squared: bool, weight: float, levels: int) -> None:
        super().__init__()
        self.squared, self.weight, self.levels = squared, weight, levels

    def forward(self, fake_BCHW: Tensor, real_BCHW: Tensor, patch_seed_B: Tensor | None = None) -> Tensor:
        distance = l2_per_image if self.squared else l1_per_image
        loss_B = fake_BCHW.new_zeros(len(fake_BCHW), dtype=torch.float32)
        for fake, real in scales(fake_BCHW, real_BCHW.detach(), self.levels):
            loss_B = loss_B + self.weight * distance(fake, real)
        return loss_B


class PerceptualLoss(ReconstructionLoss):
    """L1 on pixels plus L1 on feature maps of a frozen network, at several scales (Hoshen et al. 2019, Eq. 2).

    Scale k is the image sub-sampled bilinearly k times by two.  The network sees every scale `magnify` times larger
    (bilinearly; not in the paper): its strides suit photographs, and leave few values of 28 px.  With `patch`, the
    feature maps of the full-size image are those of one random square of that side in train mode (the whole image in
    eval mode); pixels and the smaller scales always use the whole image.
    """

    def __init__(
        self,
        features: FeatureNet,
        taps: Sequence[str],
        levels: int,
        *,
        magnify: float,
        pixel_weight: float,
        feature_weight: float,
        patch: int | None,
    ) -> None:
        super().__init__()
        features.check_taps(taps)
        self.features, self.taps, self.levels = features, tuple(taps), levels
        self.magnify, self.pixel_weight, self.feature_weight, self.patch = magnify, pixel_weight, feature_weight, patch

    def forward(
        self,
        fake_BCHW: Tensor,
        real_BCHW: Tensor,
        patch_seed_B: Tensor | None = None,
        real_maps_BV: Tensor | None = None,
    ) -> Tensor:
        """As `ReconstructionLoss.forward`.

        Args:
            real_maps_BV: `real_maps` of `real_BCHW`, if they are known; without patches.
        """
        loss_B = fake_BCHW.new_zeros(len(fake_BCHW), dtype=torch.float32)
        known = None if real_maps_BV is None else _Values(real_maps_BV)
        for level, (fake, real) in enumerate(scales(fake_BCHW, real_BCHW.detach(), self.levels)):
            if self.pixel_weight:
                loss_B = loss_B + self.pixel_weight * l1_per_image(fake, real)
            if level == 0 and self.patch and self.training:
                if patch_seed_B is None:
                    raise ValueError("a loss with patches needs patch_seed_B in train mode")
                fake, real = crop(fake, self.patch, patch_seed_B), crop(real, self.patch, patch_seed_B)
            if self.feature_weight:
                loss_B = loss_B + self.feature_weight * self._features(fake, real, known)
        return loss_B

    @torch.no_grad()
    def real_maps(self, real_BCHW: Tensor) -> Tensor:
        """The values of all feature maps of images at all scales, [B, V], which `forward` takes."""
        maps = [found for img, _ in scales(real_BCHW, real_BCHW, self.levels) for found in self._maps(img)]
        return torch.cat([found.permute(0, 2, 3, 1).flatten(1) for found in maps], 1)

    def _features(self, fake: Tensor, real: Tensor, known: _Values | None) -> Tensor:
        with torch.no_grad():
            real_maps = [] if known else self._maps(real)
        fake_maps = self._maps(fake)
        if known:
            real_maps = [known.take(found) for found in fake_maps]
        terms = [l1_per_image(*maps) for maps in zip(fake_maps, real_maps, strict=True)]
        return torch.stack(terms).sum(0)

    def _maps(self, img_BCHW: Tensor) -> list[Tensor]:
        if self.magnify > 1:
            height, width = (round(self.magnify * side) for side in img_BCHW.shape[-2:])
            img_BCHW = _resize(img_BCHW, (height, width))
        return self.features(img_BCHW, self.taps)


class _Values:
    """Feature maps out of the values of `PerceptualLoss.real_maps`, one after the other."""

    def __init__(self, value_BV: Tensor) -> None:
        self.value_BV, self.at = value_BV, 0

    def take(self, like_BCHW: Tensor) -> Tensor:
        """The next map, of that shape; channels last, as feature networks make them."""
        _, channels, height, width = like_BCHW.shape
        begin, self.at = self.at, self.at + channels * height * width
        return self.value_BV[:, begin : self.at].unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)


class LikelihoodLoss(ReconstructionLoss):
    """-log p(x | z) of an image in nats: a sum over pixels, which are independent given G(z), their mean.

    Bernoulli (Kingma & Welling 2014, App. C.1), for pixels in [0, 1] the cross-entropy; or, with a deviation, normal,
    without its constant.
    """

    def __init__(self, weight: float, deviation: float | None) -> None:
        super().__init__()
        self.weight, self.deviation = weight, deviation

    def forward(self, fake_BCHW: Tensor, real_BCHW: Tensor, patch_seed_B: Tensor | None = None) -> Tensor:
        fake, real = fake_BCHW.float(), real_BCHW.detach().float()
        if self.deviation is not None:
            nats = 0.5 * ((real - fake) / self.deviation).square()
        else:
            nats = -real * (fake + LEAST_CHANCE).log() - (1 - real) * (1 - fake + LEAST_CHANCE).log()
        return self.weight * nats.flatten(1).sum(1)


class LaplacianLoss(ReconstructionLoss):
    """Laplacian pyramid loss of Bojanowski et al. 2018 (GLO), Eq. 4: sum_j 2^(2j) |L^j(x) - L^j(x')|_1.

    Level j has 4^j times fewer values than the image, so divided by the image's size each term is the
    *mean* absolute difference of its level; it is computed as that, which also holds for odd sides.
    The last level is the low-pass residual.  The pyramid is linear, so one pyramid of the difference suffices.
    """

    binomial: Tensor

    def __init__(self, levels: int, weight: float) -> None:
        super().__init__()
        self.levels, self.weight = levels, weight
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("binomial", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, fake_BCHW: Tensor, real_BCHW: Tensor, patch_seed_B: Tensor | None = None) -> Tensor:
        rest = fake_BCHW.float() - real_BCHW.detach().float()
        loss_B = rest.new_zeros(len(rest))
        for _ in range(self.levels - 1):
            smaller = self._blur(rest)[..., ::2, ::2]
            band = rest - F.interpolate(smaller, size=rest.shape[-2:], mode="bilinear", align_corners=False)
            loss_B = loss_B + band.abs().mean((1, 2, 3))
            rest = smaller
        return self.weight * (loss_B + rest.abs().mean((1, 2, 3)))

    def _blur(self, img_BCHW: Tensor) -> Tensor:
        channels = img_BCHW.shape[1]
        padded = F.pad(img_BCHW, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, self.binomial.expand(channels, 1, 5, 5), groups=channels)


def build_loss(config: LossConfig, resolution: int, features: FeatureNet | None = None) -> ReconstructionLoss:
    """Build the configured loss; `features` (see `perceptual.build_features`) only for kind=perceptual.

    Raises:
        UserError: taps or levels that this network or resolution does not have, or options of another kind.
    """
    levels = default_levels(config, resolution) if config.levels is None else config.levels
    if resolution >> (levels - 1) < SMALLEST_LEVEL:
        most = max(k for k in range(1, 9) if resolution >> (k - 1) >= SMALLEST_LEVEL)
        raise UserError(f"loss.levels={levels} leaves nothing of {resolution} px images; use at most {most}")
    if config.kind == "perceptual":
        if features is None:
            raise ValueError("kind=perceptual needs a feature network")
        if config.patch and levels < 2:
            raise UserError("loss.patch needs loss.levels of 2 or more: the whole image is seen at lower scales")
        return PerceptualLoss(
            features,
            config.taps or default_taps(config.network, resolution),
            levels,
            magnify=config.magnify,
            pixel_weight=config.pixel_weight,
            feature_weight=config.feature_weight,
            patch=config.patch,
        )
    for option in ("patch", "taps"):
        if getattr(config, option) is not None:
            raise UserError(f"loss.{option} belongs to loss.kind=perceptual, not {config.kind}; remove it")
    if config.kind in ("bernoulli", "gaussian"):
        if levels > 1:
            raise UserError(f"loss.kind={config.kind} is a likelihood of the image itself; remove loss.levels")
        return LikelihoodLoss(config.pixel_weight, config.deviation if config.kind == "gaussian" else None)
    if config.kind == "laplacian":
        return LaplacianLoss(levels, config.pixel_weight)
    return PixelLoss(config.kind == "l2", config.pixel_weight, levels)


def default_taps(network: str, resolution: int) -> tuple[str, ...]:
    """Default feature maps at a resolution: the paper's for VGG-16, ours for SqueezeNet (not in the paper)."""
    if network == "squeezenet":
        return ("conv1", "fire3", "fire5") if resolution <= 64 else ("conv1", "fire3", "fire5", "fire9")
    taps = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
    return taps[:3] if resolution < 64 else taps[:4] if resolution == 64 else taps


def default_levels(config: LossConfig, resolution: int) -> int:
    """Default number of scales of the loss.

    Perceptual: one up to 64 px and two above (the paper); three at 512 and four at 1024 are ours, where
    the paper only says "more".  Patches need one more than a single scale.  Laplacian: down to 4 or 8 px.
    Pixels: one.
    """
    if config.kind == "laplacian":
        return min(8, (resolution - 1).bit_length() - 2)
    if config.kind != "perceptual":
        return 1
    levels = 1 if resolution <= 64 else 2 if resolution <= 256 else 3 if resolution <= 512 else 4
    return max(levels, 2) if config.patch else levels


def scales(fake_BCHW: Tensor, real_BCHW: Tensor, levels: int) -> list[tuple[Tensor, Tensor]]:
    """Both images at full size and sub-sampled bilinearly by two, `levels` scales in all.

    For even sides bilinear interpolation at half size is the mean of 2 x 2 pixels, so nothing aliases.
    """
    pairs = [(fake_BCHW, real_BCHW)]
    for _ in range(levels - 1):
        fake, real = pairs[-1]
        half = (fake.shape[-2] // 2, fake.shape[-1] // 2)
        pairs.append((_resize(fake, half), _resize(real, half)))
    return pairs


def _resize(img_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(img_BCHW, size=size, mode="bilinear", align_corners=False)


def l2_per_image(fake: Tensor, real: Tensor) -> Tensor:
    """Mean squared difference of each image, [B] float32."""
    return (fake.float() - real.float()).square().flatten(1).mean(1)


def l1_per_image(fake: Tensor, real: Tensor) -> Tensor:
    """Mean absolute difference of each image, [B] float32, without a gradient to `real`.

    Saves one byte per value for the backward pass (the sign), neither the difference nor `real`.
    """
    return _L1PerImage.apply(fake, real)


class _L1PerImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fake, real):  # type: ignore[no-untyped-def]
        difference = fake - real
        ctx.save_for_backward(difference.sign().to(torch.int8))
        ctx.fake_dtype = fake.dtype
        # Accumulate in float32 at least: a bf16 sum over a million values would have no precision.
        wide = torch.float64 if fake.dtype == torch.float64 else torch.float32
        return difference.abs_().flatten(1).mean(1, dtype=wide)

    @staticmethod
    def backward(ctx, grad_B):  # type: ignore[no-untyped-def]
        (sign,) = ctx.saved_tensors
        each_B = grad_B / max(sign[0].numel(), 1) if len(sign) else grad_B
        return sign.to(ctx.fake_dtype) * each_B.to(ctx.fake_dtype).view(-1, *[1] * (sign.dim() - 1)), None
