"""EfficientNet-Lite0 up to its pooled features (Tan & Le 2019; the Lite variant has ReLU6 and no squeeze-and-excite).

Legend: B batch, F = 1280 features.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# (repeats, kernel, stride of the first, expansion, output channels) of each stage: Tan & Le, Table 1.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
BATCH_NORM_EPS = 1e-3  # TensorFlow's value, with which the network was trained


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: an odd pixel of padding is added right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, kernel, stride in zip(x_BCHW.shape[2:], self.kernel_size, self.stride, strict=True)
        )
        if height % 2 or width % 2:
            x_BCHW = F.pad(x_BCHW, (width // 2, width - width // 2, height // 2, height - height // 2))
            height = width = 0
        padding = (height // 2, width // 2)  # by the convolution itself where it can: it needs no copy
        return F.conv2d(x_BCHW, self.weight, self.bias, self.stride, padding, groups=self.groups)


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        SameConv2d(inputs, outputs, kernel, stride, groups),
        nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPS),
    ]
    return nn.Sequential(*layers, nn.ReLU6(inplace=True)) if act else nn.Sequential(*layers)


class Block(nn.Module):
    """Inverted residual block: expand, depthwise convolution, linear projection; a skip where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = _unit(inputs, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _unit(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _unit(hidden, outputs, 1, act=False)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.project(self.depthwise(self.expand(x_BCHW)))
        return x_BCHW + y_BCHW if self.skip else y_BCHW


class EfficientNetLite0(nn.Module):
    """Images in (rgb255 - 127) / 128, [B, 3, H, W] -> pooled features [B, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, STEM, 3, stride=2)
        blocks: list[nn.Module] = []
        inputs = STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for repeat in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = _unit(inputs, HEAD, 1)

    def forward(self, img_B3HW: Tensor) -> Tensor:
        return self.head(self.maps(img_B3HW)[-1]).mean((2, 3))

    def maps(self, img_B3HW: Tensor) -> list[Tensor]:
        """The last map of each stage, [B, C, H, W]."""
        x_BCHW, maps, blocks = self.stem(img_B3HW), [], iter(self.blocks)
        for repeats, *_ in STAGES:
            for block in islice(blocks, repeats):
                x_BCHW = block(x_BCHW)
            maps.append(x_BCHW)
        return maps


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published weights to this module's names, without the classifier `_fc`."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("_fc."):
            continue
        parts = name.split(".")
        if parts[0] == "_blocks":
            block = int(parts[1])
            renamed[f"blocks.{block}.{_BLOCK_LAYERS[parts[2]]}.{parts[3]}"] = tensor
        else:
            renamed[f"{_OUTER_LAYERS[parts[0]]}.{parts[1]}"] = tensor
    return renamed


_OUTER_LAYERS = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1"}
_BLOCK_LAYERS = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def build(weights: dict[str, Tensor]) -> EfficientNetLite0:
    """Build the network with the published weights, frozen and in eval mode.

    Each BatchNorm is folded into the convolution before it: on a CPU it would take as long as that.
    """
    with torch.device("meta"):
        network = EfficientNetLite0()
    network.load_state_dict(rename(weights), assign=True)
    network.eval().requires_grad_(False)
    for unit in list(network.modules()):
        match list(unit.children()):
            case [SameConv2d() as convolution, nn.BatchNorm2d() as norm, *_]:
                unit[0] = fuse_conv_bn_eval(convolution, norm)  # type: ignore[operator]
                unit[1] = nn.Identity()  # type: ignore[operator]
    return network.requires_grad_(False)
