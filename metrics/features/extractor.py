"""Named feature extractors: functions from uint8 images to one feature vector per image.

Feature distances of different networks are not comparable, so the metric has the network in its
name (`metrics/spec.py`).

    extractor = build_extractor("lite0", device)
    features_BF = extractor(img_BCHW)

To add an extractor: `EXTRACTORS["name"] = ExtractorSpec(...)`.

Legend: B batch, C channels (1 or 3), H and W pixels, F feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...datasets.assets.catalogue import load_weights
from ...errors import UserError, one_line
from ...models.perceptual import build_features
from . import efficientnet_lite, inception

CPU_BATCH = 8

Weights = dict[str, Tensor]
Network = Callable[[Tensor], Tensor]  # prepared images -> features_BF


@dataclass(frozen=True)
class ExtractorSpec:
    """The definition of an extractor.

    `build(weights, convention)` returns a frozen module; `prepare` converts float images 0..255,
    [B, 3, H, W], to that module's input; `weights` is the default asset.  It is a single asset, without
    alternatives: other weights would be another metric under the same name.
    """

    weights: str
    dim: int
    build: Callable[[Weights, str], nn.Module]
    prepare: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Extractor:
    """Callable: uint8 images [B, C, H, W] (grey or RGB, any size) -> float32 features [B, F] on the CPU.

    The features of an image do not depend on its batch mates.
    """

    name: str
    dim: int
    device: torch.device
    _prepare: Callable[[Tensor], Tensor]
    _network: nn.Module

    @torch.inference_mode()
    def __call__(self, img_BCHW: Tensor) -> Tensor:
        if img_BCHW.dtype != torch.uint8 or img_BCHW.ndim != 4 or img_BCHW.shape[1] not in (1, 3):
            raise UserError(
                f"extractor {self.name} takes uint8 images [B, 1 or 3, H, W], "
                f"not {img_BCHW.dtype} {list(img_BCHW.shape)}"
            )
        if len(img_BCHW) == 0:
            return torch.zeros(0, self.dim)
        # On a CPU, small batches stay in the cache and take a quarter of the time of a hundred at once.
        parts = img_BCHW.split(CPU_BATCH if self.device.type == "cpu" else len(img_BCHW))
        return torch.cat([self._features(part) for part in parts])

    def _features(self, img_BCHW: Tensor) -> Tensor:
        img_B3HW = self._prepare(img_BCHW.to(self.device).float().expand(-1, 3, -1, -1))
        return self._network(img_B3HW.contiguous(memory_format=torch.channels_last)).float().cpu()


def extractor_spec(name: str) -> ExtractorSpec:
    """The definition of the named extractor.

    Raises:
        UserError: there is none of that name.
    """
    if name not in EXTRACTORS:
        raise UserError(f"no feature extractor {name!r}; there are {', '.join(sorted(EXTRACTORS))}")
    return EXTRACTORS[name]


def build_extractor(name: str, device: torch.device | str = "cpu", weights: str | None = None) -> Extractor:
    """Build the named extractor.

    Args:
        weights: asset or safetensors file to use instead of the default.
    Raises:
        UserError: no such extractor, or the weights are of another network.
    """
    spec = extractor_spec(name)
    source = weights or spec.weights
    tensors, convention = load_weights(source)
    try:
        network = spec.build(tensors, convention)
    except (RuntimeError, KeyError) as error:  # torch's strict load, or a name that cannot be translated
        raise UserError(f"the weights {source} do not fit extractor {name}: {one_line(error)}") from error
    device = torch.device(device)
    return Extractor(
        name,
        spec.dim,
        device,
        spec.prepare,
        cast(Any, network.to(device)).to(memory_format=torch.channels_last),
    )


class _PooledTap(nn.Module):
    """The spatial mean of one feature map of a perceptual network."""

    def __init__(self, features: nn.Module, tap: str) -> None:
        super().__init__()
        self.features, self.tap = features, tap

    def forward(self, img_B3HW: Tensor) -> Tensor:
        (map_BFHW,) = self.features(img_B3HW, (self.tap,))
        return map_BFHW.mean((2, 3))


def _perceptual(network: str, tap: str) -> Callable[[Weights, str], nn.Module]:
    return lambda weights, convention: _PooledTap(build_features(network, weights, convention), tap)


def _resized(side: int, mean: float, scale: float) -> Callable[[Tensor], Tensor]:
    """(img - mean) / scale at side x side pixels; low-pass filtered when downsampling (no aliasing)."""

    def prepare(img_B3HW: Tensor) -> Tensor:
        img_B3HW = F.interpolate(img_B3HW, (side, side), mode="bilinear", align_corners=False, antialias=True)
        return (img_B3HW - mean) / scale

    return prepare


def _as_in_fid(img_B3HW: Tensor) -> Tensor:
    return (inception.resize(img_B3HW) - 128.0) / 128.0


EXTRACTORS: dict[str, ExtractorSpec] = {
    # 128 px keeps the last feature map at 7 x 7 and an image at 0.2 GFLOP: cheap enough for a CPU.
    "squeezenet": ExtractorSpec("squeezenet-caffe", 512, _perceptual("squeezenet", "fire9"), _resized(128, 0.0, 255.0)),
    "vgg16": ExtractorSpec("vgg16-caffe", 512, _perceptual("vgg16", "relu5_3"), _resized(224, 0.0, 255.0)),
    "lite0": ExtractorSpec(
        "lite0",
        efficientnet_lite.HEAD,
        lambda weights, _: efficientnet_lite.build(weights),
        _resized(224, 127.0, 128.0),
    ),
    "inception": ExtractorSpec("inception", 2048, lambda weights, _: inception.build(weights), _as_in_fid),
}
