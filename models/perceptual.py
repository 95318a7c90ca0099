"""Frozen feature networks: VGG-16 and SqueezeNet 1.1 up to the deepest requested tap.

Weights follow one of two input conventions.  `torch`: RGB in [0, 1], ImageNet mean and standard
deviation.  `caffe`: BGR in 0-255 minus the mean; its feature maps are 255 x 0.226 = 58 times larger
and are divided by that, so that "all weights 1" means the same for both.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError

TORCH_MEAN, TORCH_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)
CAFFE_SCALE = 255 * 0.226
SMALLEST_SIDE = 32

VGG16_WIDTHS = {1: (64, 64), 2: (128, 128), 3: (256,) * 3, 4: (512,) * 3, 5: (512,) * 3}
# (squeeze, expand) of fire2 ... fire9; a 3x3 stride-2 max-pool stands before the ones in POOL_BEFORE.
FIRE_WIDTHS = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128), 6: (48, 192), 7: (48, 192), 8: (64, 256)}
FIRE_WIDTHS[9] = FIRE_WIDTHS[8]
POOL_BEFORE = ("fire2", "fire4", "fire6")


class FeatureNet(nn.Module):
    """A frozen network in eval mode that returns the feature maps named in `taps`.

    It always stays in eval mode, has no trainable parameters and computes nothing beyond the deepest
    tap.  Gradients flow to the image only.
    """

    names: tuple[str, ...] = ()
    mean: Tensor
    std: Tensor

    def __init__(self, convention: str) -> None:
        super().__init__()
        if convention not in ("caffe", "torch"):
            raise UserError(f"unknown input convention {convention!r} of a feature network: caffe or torch")
        self.convention = convention
        caffe = convention == "caffe"
        mean_C = torch.tensor(CAFFE_MEAN_BGR if caffe else TORCH_MEAN)
        std_C = torch.ones(3) if caffe else torch.tensor(TORCH_STD)
        self.register_buffer("mean", mean_C.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std_C.view(1, 3, 1, 1), persistent=False)

    def forward(self, img_BCHW: Tensor, taps: Sequence[str]) -> list[Tensor]:
        """Feature maps [B, C', H', W'] in the order of `taps`, in the scale of a unit-variance input.

        Args:
            img_BCHW: values in [0, 1]; one channel is repeated to three, a side below 32 px is padded
                to 32 with black, evenly (28 px: two on each side).
        Raises:
            UserError: a tap that this network does not have.
        """
        self.check_taps(taps)
        wanted, last = set(taps), max(self.names.index(tap) for tap in taps)
        h, maps = self.normalise(img_BCHW), {}
        for name in self.names[: last + 1]:
            h = self.layer(name, h)
            if name in wanted:
                maps[name] = h / CAFFE_SCALE if self.convention == "caffe" else h
        return [maps[tap] for tap in taps]

    def layer(self, name: str, h: Tensor) -> Tensor:
        """The map after layer `name`, from the map before it."""
        raise NotImplementedError

    def check_taps(self, taps: Sequence[str]) -> None:
        """Raise UserError for an empty list of taps, or names that this network does not have."""
        unknown = [tap for tap in taps if tap not in self.names]
        if unknown or not taps:
            raise UserError(f"no feature map {', '.join(unknown) or '(none given)'}; there are {', '.join(self.names)}")

    def normalise(self, img_BCHW: Tensor) -> Tensor:
        """Convert images in [0, 1] to the network's input: 3 channels, at least 32 px, normalised."""
        if img_BCHW.shape[1] == 1:
            img_BCHW = img_BCHW.expand(-1, 3, -1, -1)
        height, width = img_BCHW.shape[-2:]
        if min(height, width) < SMALLEST_SIDE:
            rows, columns = max(SMALLEST_SIDE - height, 0), max(SMALLEST_SIDE - width, 0)
            img_BCHW = F.pad(img_BCHW, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        if self.convention == "caffe":
            img_BCHW = img_BCHW.flip(1) * 255
        return (img_BCHW - self.mean) / self.std

    def train(self, mode: bool = True) -> FeatureNet:
        """Stay in eval mode; `mode` is ignored."""
        del mode
        return super().train(False)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights by name, freeze them and convert them to channels-last."""
        own = self.state_dict()
        for name, value in own.items():
            if name not in weights:
                raise UserError(f"the weights lack {name}; are they those of another network?")
            if weights[name].shape != value.shape:
                found, expected = tuple(weights[name].shape), tuple(value.shape)
                raise UserError(f"the weights hold {name} with shape {found}, expected {expected}")
        self.load_state_dict({name: weights[name] for name in own})
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()


class Vgg16(FeatureNet):
    """The 13 convolutions of VGG-16 (Simonyan & Zisserman 2015); taps relu1_1 ... relu5_3."""

    names = tuple(f"relu{block}_{i + 1}" for block, widths in VGG16_WIDTHS.items() for i in range(len(widths)))

    def __init__(self, convention: str) -> None:
        super().__init__(convention)
        fan_in = 3
        for block, widths in VGG16_WIDTHS.items():
            for i, width in enumerate(widths):
                self.add_module(f"conv{block}_{i + 1}", nn.Conv2d(fan_in, width, 3, padding=1))
                fan_in = width

    def layer(self, name: str, h: Tensor) -> Tensor:
        if re.fullmatch(r"relu[2-5]_1", name):
            h = F.max_pool2d(h, 2)
        return F.relu(self.get_submodule(name.replace("relu", "conv"))(h), inplace=True)


class SqueezeNet(FeatureNet):
    """SqueezeNet 1.1 without its classifier (Iandola et al. 2016); taps conv1, fire2 ... fire9.

    As published: conv1 unpadded, pooling windows rounded up.
    """

    names = ("conv1", *(f"fire{i}" for i in FIRE_WIDTHS))

    def __init__(self, convention: str) -> None:
        super().__init__(convention)
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        fan_in = 64
        for i, (squeeze, expand) in FIRE_WIDTHS.items():
            self.add_module(f"fire{i}", Fire(fan_in, squeeze, expand))
            fan_in = 2 * expand

    def layer(self, name: str, h: Tensor) -> Tensor:
        if name in POOL_BEFORE:
            h = F.max_pool2d(h, 3, stride=2, ceil_mode=True)
        h = self.get_submodule(name)(h)
        return F.relu(h, inplace=True) if name == "conv1" else h


class Fire(nn.Module):
    """1x1 squeeze, then 1x1 and 3x3 expansions side by side, each followed by ReLU."""

    def __init__(self, fan_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(fan_in, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        h = F.relu(self.squeeze(h), inplace=True)
        return F.relu(torch.cat([self.expand1(h), self.expand3(h)], dim=1), inplace=True)


NETWORKS: dict[str, type[FeatureNet]] = {"vgg16": Vgg16, "squeezenet": SqueezeNet}


def feature_names(network: str) -> tuple[str, ...]:
    """The taps of a network, shallow to deep."""
    return _network(network).names


def build_features(network: str, weights: Mapping[str, Tensor], convention: str) -> FeatureNet:
    """Build a frozen feature network: forward(img_BCHW in [0, 1], taps) -> list of feature maps.

    Args:
        network: `vgg16` or `squeezenet`.
        weights: by name, `conv1_1.weight` ... or `conv1.weight`, `fire2.squeeze.weight` ...; others are ignored.
        convention: input convention of the weights, `caffe` or `torch`.
    Raises:
        UserError: unknown network or convention, missing or misshapen weights.
    """
    net = _network(network)(convention)
    net.load(weights)
    return net


def _network(name: str) -> type[FeatureNet]:
    if name not in NETWORKS:
        raise UserError(f"unknown feature network {name!r}: {_either(NETWORKS)}")
    return NETWORKS[name]


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)
