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
from ..parallel import on_one_core_each
from . import efficientnet_lite, inception

BATCH, BATCH_BYTES = 16, 32 << 20  # on a CPU: small batches stay in the cache; of float32 pixels

Weights = dict[str, Tensor]
Maps = Callable[[Any, Tensor], list[Tensor]]  # network, prepared images -> feature maps [B, C, H, W]


@dataclass(frozen=True)
class ExtractorSpec:
    """The definition of an extractor.

    `build(weights, convention)` returns a frozen module; `prepare` converts float images 0..255,
    [B, 1 or 3, H, W], to that module's input; `weights` is the default asset.  It is a single asset, without
    alternatives: other weights would be another metric under the same name.

    `gflop` is the cost of one image, a multiply-add counted as two.

    `maps` gives the feature maps of a perceptual distance; `head` names weight and bias of the classifier behind the
    features among the weights, the bias empty if none is used.
    """

    weights: str
    dim: int
    build: Callable[[Weights, str], nn.Module]
    prepare: Callable[[Tensor], Tensor]
    maps: Maps | None = None
    head: tuple[str, str] | None = None
    gflop: float = 0.0


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
    _maps: Maps | None = None

    def __call__(self, img_BCHW: Tensor) -> Tensor:
        if img_BCHW.dtype != torch.uint8 or img_BCHW.ndim != 4 or img_BCHW.shape[1] not in (1, 3):
            raise UserError(
                f"extractor {self.name} takes uint8 images [B, 1 or 3, H, W], "
                f"not {img_BCHW.dtype} {list(img_BCHW.shape)}"
            )
        if len(img_BCHW) == 0:
            return torch.zeros(0, self.dim)
        if self.device.type != "cpu":
            return self._features(img_BCHW)
        batch = max(1, min(BATCH, BATCH_BYTES // (4 * img_BCHW[0].numel())))
        return torch.cat(list(on_one_core_each(self._features, img_BCHW.split(batch))))

    @torch.inference_mode()
    def maps(self, img_BCHW: Tensor) -> list[Tensor]:
        """Feature maps [B, C, H, W] of uint8 images, shallow to deep, on the extractor's device.

        Raises:
            UserError: this extractor has no feature maps to compare.
        """
        if self._maps is None:
            raise UserError(f"extractor {self.name} has no feature maps; use squeezenet, vgg16 or lite0")
        return self._maps(self._network, self._prepared(img_BCHW))

    @torch.inference_mode()  # holds for one thread only
    def _features(self, img_BCHW: Tensor) -> Tensor:
        return self._network(self._prepared(img_BCHW)).float().cpu()

    def _prepared(self, img_BCHW: Tensor) -> Tensor:
        img_B3HW = self._prepare(img_BCHW.to(self.device).float()).expand(-1, 3, -1, -1)
        return img_B3HW.contiguous(memory_format=torch.channels_last)


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
        spec.maps,
    )


def classifier_head(name: str) -> tuple[Tensor, Tensor]:
    """The last layer of the named extractor's classifier, from features to logits: (weight [K, F], bias [K]).

    Raises:
        UserError: no such extractor, it has no classifier, or the weights lack it.
    """
    spec = extractor_spec(name)
    if spec.head is None:
        raise UserError(f"extractor {name} has no classifier")
    tensors, _ = load_weights(spec.weights)
    weight, bias = spec.head
    missing = [layer for layer in spec.head if layer and layer not in tensors]
    if missing or tensors[weight].shape[1:] != (spec.dim,):
        raise UserError(f"the weights {spec.weights} do not fit the classifier of {name}: {weight} is missing or wrong")
    weight_KF = tensors[weight].float()
    return weight_KF, tensors[bias].float() if bias else torch.zeros(len(weight_KF))


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

    def prepare(img_BCHW: Tensor) -> Tensor:
        img_BCHW = F.interpolate(img_BCHW, (side, side), mode="bilinear", align_corners=False, antialias=True)
        return (img_BCHW - mean) / scale

    return prepare


def _as_in_fid(img_BCHW: Tensor) -> Tensor:
    return (inception.resize(img_BCHW) - 128.0) / 128.0


def _lite0(side: int, gflop: float) -> ExtractorSpec:
    return ExtractorSpec(
        "lite0",
        efficientnet_lite.HEAD,
        lambda weights, _: efficientnet_lite.build(weights),
        _resized(side, 127.0, 128.0),
        efficientnet_lite.EfficientNetLite0.maps,
        ("_fc.weight", "_fc.bias"),
        gflop,
    )


def _maps_at(*taps: str) -> Maps:
    return lambda network, img_B3HW: network.features(img_B3HW, taps)


# The layers of LPIPS (Zhang et al. 2018).
SQUEEZENET_MAPS = _maps_at("conv1", "fire3", "fire5", "fire6", "fire7", "fire8", "fire9")
VGG16_MAPS = _maps_at("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")

EXTRACTORS: dict[str, ExtractorSpec] = {
    # 128 px keeps the last feature map at 7 x 7 and an image at 0.2 GFLOP: cheap enough for a CPU.
    "squeezenet": ExtractorSpec(
        "squeezenet-caffe",
        512,
        _perceptual("squeezenet", "fire9"),
        _resized(128, 0.0, 255.0),
        SQUEEZENET_MAPS,
        gflop=0.16,
    ),
    "vgg16": ExtractorSpec(
        "vgg16-caffe", 512, _perceptual("vgg16", "relu5_3"), _resized(224, 0.0, 255.0), VGG16_MAPS, gflop=30.7
    ),
    "lite0": _lite0(224, 0.768),  # as it was trained
    # The published score takes the classes without their bias, as the graph has no other output.
    "inception": ExtractorSpec(
        "inception", 2048, lambda weights, _: inception.build(weights), _as_in_fid, head=("fc.weight", ""), gflop=11.4
    ),
    # For images of up to 64 px: larger inputs only magnify, at a fifth of the speed.
    "lite0-96": _lite0(96, 0.141),
}
