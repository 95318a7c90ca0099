"""The perceptual loss and its gradient at high resolution against the naive form: time, and memory at its peak.

    python benchmarks/perceptual.py [--resolutions 256 512 1024 --threads T]

Naive: a graph for both images, differences stored, feature maps copied, the same taps and scales. Both on one random
image. Memory is counted: bytes of results and gradients that are alive at once.

Legend: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from glann.config.sections import LossConfig
from glann.models.cost import training_bytes
from glann.models.losses import build_loss, default_levels, default_taps, scales
from glann.models.perceptual import Vgg16, build_features
from harness import Row, least, machine, report
from published import vgg16
from torch import Tensor, nn

LAYERS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29}  # of VGG-16's features


class Naive(nn.Module):
    """loss(fake, real) -> loss_B, as it is written down."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        layers = [nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in vgg16()]
        self.features = nn.Sequential(*layers).requires_grad_(False)
        self.taken = {LAYERS[tap] for tap in default_taps("vgg16", resolution)}
        self.levels = default_levels(LossConfig(), resolution)

    def forward(self, fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
        real_BCHW = real_BCHW.requires_grad_()  # so that there is a graph for it
        terms = []
        for fake, real in scales(fake_BCHW, real_BCHW, self.levels):
            maps = zip([fake, *self.maps(fake)], [real, *self.maps(real)], strict=True)
            terms += [(one - other).abs().flatten(1).mean(1) for one, other in maps]
        return torch.stack(terms).sum(0)

    def maps(self, h: Tensor) -> list[Tensor]:
        found = []
        for number, layer in enumerate(self.features):
            h = layer(h)
            if number in self.taken:
                found.append(h / 1.0)
        return found


def rows(resolutions: tuple[int, ...] = (256, 512, 1024), threads: int = 2) -> list[Row]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = []
    for side in resolutions:
        features = build_features("vgg16", Vgg16("torch").state_dict(), "torch")
        losses = {"ours": build_loss(LossConfig(), side, features), "naive": Naive(side)}
        sides = {name: step_of(loss, side) for name, loss in losses.items()}
        taken = least(sides, 2 if side <= 256 else 1)
        work = f"perceptual loss and gradient, one image of {side} px"
        found.append(Row(f"{work}, {threads} threads", "naive", taken["naive"], taken["ours"], "s"))
        image = (3, side, side)
        held = {name: float(training_bytes(loss, 1, image, image)) for name, loss in losses.items()}
        found.append(Row(f"{work}, memory", "naive", held["naive"], held["ours"], "B"))
    return found


def step_of(loss: nn.Module, side: int) -> Callable[[], None]:
    def step() -> None:
        fake, real = torch.rand(1, 3, side, side, requires_grad=True), torch.rand(1, 3, side, side)
        loss(fake, real).sum().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    report(rows(tuple(options.resolutions), options.threads), machine())


if __name__ == "__main__":
    main()
