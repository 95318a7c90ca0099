"""The Inception-v3 of the Fréchet Inception Distance, up to its 2,048 pooled features.

The network of Szegedy et al. 2015 in TensorFlow's 2015-12-05 graph, on which FID is defined: its
average pools exclude the padding, and the last block uses max pooling.  Parameter names are those of
the PyTorch port of that graph, whose weights are loaded unchanged.

Legend: B batch, F = 2048 features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299


class BasicConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)), inplace=True)


def _average(x_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """The block at 35 x 35."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 64, 1)
        self.branch5x5_1 = BasicConv2d(inputs, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """The reduction from 35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """The block at 17 x 17, with 7 x 7 filters factored into 1 x 7 and 7 x 1."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        row: dict[str, object] = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict[str, object] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv2d(inputs, 192, 1)
        self.branch7x7_1 = BasicConv2d(inputs, width, 1)
        self.branch7x7_2 = BasicConv2d(width, width, **row)  # type: ignore[arg-type]
        self.branch7x7_3 = BasicConv2d(width, 192, **column)  # type: ignore[arg-type]
        self.branch7x7dbl_1 = BasicConv2d(inputs, width, 1)
        self.branch7x7dbl_2 = BasicConv2d(width, width, **column)  # type: ignore[arg-type]
        self.branch7x7dbl_3 = BasicConv2d(width, width, **row)  # type: ignore[arg-type]
        self.branch7x7dbl_4 = BasicConv2d(width, width, **column)  # type: ignore[arg-type]
        self.branch7x7dbl_5 = BasicConv2d(width, 192, **row)  # type: ignore[arg-type]
        self.branch_pool = BasicConv2d(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """The reduction from 17 x 17 to 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(inputs, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(inputs, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """The block at 8 x 8; the last one of the network uses max pooling."""

    def __init__(self, inputs: int, *, pool_max: bool) -> None:
        super().__init__()
        self.pool_max = pool_max
        self.branch1x1 = BasicConv2d(inputs, 320, 1)
        self.branch3x3_1 = BasicConv2d(inputs, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(inputs, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool_max else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """Images in (rgb255 - 128) / 128 of 299 x 299 pixels -> pooled features [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, pool_max=False)
        self.Mixed_7c = BlockE(2048, pool_max=True)

    def forward(self, img_B3HW: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(img_B3HW)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def resize(img_BCHW: Tensor, side: int = SIDE) -> Tensor:
    """Resize bilinearly as TensorFlow 1 does: source = target * in / out, no half-pixel offset, no low-pass filter.

    FID is defined with this resize; others shift the score by whole points.
    """
    rows_TH = _bilinear(img_BCHW.shape[2], side).to(img_BCHW)
    columns_TW = _bilinear(img_BCHW.shape[3], side).to(img_BCHW)
    return rows_TH @ img_BCHW @ columns_TW.T


def _bilinear(size: int, side: int) -> Tensor:
    """The matrix [side, size] of the resize of one axis."""
    source_T = torch.arange(side, dtype=torch.float64) * (size / side)
    low_T = source_T.floor().long().clamp(max=size - 1)
    high_T = (low_T + 1).clamp(max=size - 1)
    share_T = source_T - low_T
    matrix = torch.zeros(side, size, dtype=torch.float64)
    matrix.scatter_add_(1, low_T[:, None], (1 - share_T)[:, None])
    matrix.scatter_add_(1, high_T[:, None], share_T[:, None])
    return matrix


def build(weights: dict[str, Tensor]) -> Inception:
    """Build the network with the given weights, frozen and in eval mode, without the classifier."""
    with torch.device("meta"):
        network = Inception()
    network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("fc.", "AuxLogits."))}, assign=True)
    return network.eval().requires_grad_(False)
