"""The generators G: latent code -> image in [0, 1].

Shapes: B batch, D latent dimension, C channels, H = W the resolution in pixels, R codes of a reference batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .activations import ACTIVATIONS
from .norm import SharedBatchNorm, frozen_statistics
from .virtual_norm import VirtualBatchNorm

if TYPE_CHECKING:  # a benchmark runs this module where only torch is installed
    from ..config.run import Config
    from ..config.sections import GeneratorConfig

FULLY_CONNECTED = 1024  # InfoGAN's first layer
START = 4  # side of the resnet's first feature map


class Generator(nn.Module):
    """Base of generators: `latent_dim`, `resolution`, `channels` and activation checkpointing.

    With a reference batch of codes R, every layer normalises by its statistics and those of the row itself.

    With `unit_input`, a code is divided by its norm first, with no gradient through the norm, as in yedidh/glann.

    With `checkpoint_activations` set, the activations inside each stage are recomputed in the backward
    pass; results and running statistics are the same either way.
    """

    reference_RD: Tensor | None

    def __init__(self, latent_dim: int, resolution: int, channels: int) -> None:
        super().__init__()
        self.latent_dim, self.resolution, self.channels = latent_dim, resolution, channels
        self.checkpoint_activations = self.unit_input = False
        self.register_buffer("reference_RD", None)

    def forward(self, z_BD: Tensor, weight_B: Tensor | None = None) -> Tensor:
        """Images img_BCHW in [0, 1]; `weight_B` is 0 for padding rows, which BatchNorm ignores."""
        if self.reference_RD is None:
            return self.images(z_BD, weight_B)
        return self.images(torch.cat([self.reference_RD.to(z_BD.dtype), z_BD]), None)[len(self.reference_RD) :]

    def images(self, z_BD: Tensor, weight_B: Tensor | None) -> Tensor:
        """The images of codes, after those of the reference batch if there is one."""
        raise NotImplementedError

    def _unit(self, z_BD: Tensor) -> Tensor:
        return z_BD / z_BD.detach().norm(dim=1, keepdim=True).clamp(min=1e-12) if self.unit_input else z_BD

    def _stage(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return function(*inputs)
        if any(isinstance(layer, SharedBatchNorm) for layer in self.modules()):
            return _checkpoint_with_statistics(self, function, *inputs)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


@torch.compiler.disable  # the compiler supports checkpoints, but not with contexts
def _checkpoint_with_statistics(net: Generator, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Checkpoint a stage so that BatchNorm counts its batch once although the stage runs twice."""
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), frozen_statistics(net)),
    )


class InfoGanGenerator(Generator):
    """InfoGAN's generator for 28, 32 and 64 px (Chen et al. 2016, as used by Hoshen et al. 2019).

    fc 1024, fc 2w(s/4)^2, then two 4x4 stride-2 transposed convolutions with 2w -> w -> C channels
    (w = `width`, published: 64), an activation between them and a sigmoid at the end.  `resize` replaces each
    transposed convolution by nearest upsampling and a 3x3 convolution (Odena et al. 2016).

    Sources differ in what lies between: InfoGAN has ReLU and BatchNorm after fc1, fc2 and up1, compare_gan (Lucic et
    al. 2018) LeakyReLU(0.2) and the same BatchNorms, and yedidh/glann LeakyReLU(0.2), BatchNorm after fc2 and up1
    only, no bias in either fc, and Xavier's normal initialisation with gain sqrt(2).
    """

    def __init__(self, config: GeneratorConfig, resolution: int, channels: int) -> None:
        super().__init__(config.latent_dim, resolution, channels)
        width, norms = config.width, config.norms
        self.side = resolution // 4
        flat = 2 * width * self.side**2
        # BatchNorm cancels a bias: Adam would only move it by rounding noise
        biased = {name: config.fc_bias and name not in norms for name in ("fc1", "fc2")}
        self.fc1 = nn.Linear(config.latent_dim, FULLY_CONNECTED, bias=biased["fc1"])
        self.fc2 = nn.Linear(FULLY_CONNECTED, flat, bias=biased["fc2"])
        double = _resized_convolution if config.upsample == "resize" else _transposed_convolution
        self.up1, self.up2 = double(2 * width, width, "up1" not in norms), double(width, channels, True)
        self.norm1 = _batch_norm(config, FULLY_CONNECTED) if "fc1" in norms else None
        self.norm2 = _batch_norm(config, flat) if "fc2" in norms else None
        self.norm3 = _batch_norm(config, width) if "up1" in norms else None
        self.activation = ACTIVATIONS[config.activation]
        if config.init == "xavier":
            self._initialise_as_published()
        else:
            self._initialise(0.02 if norms else None)

    def images(self, z_BD: Tensor, weight_B: Tensor | None) -> Tensor:
        h = self._stage(self._dense, self._unit(z_BD), weight_B)
        return self._stage(self._convolve, h, weight_B)

    def _dense(self, z_BD: Tensor, weight_B: Tensor | None) -> Tensor:
        h = self.activation(_norm(self.norm1, self.fc1(z_BD), weight_B))
        h = self.activation(_norm(self.norm2, self.fc2(h), weight_B))
        return h.view(len(h), -1, self.side, self.side)

    def _convolve(self, h: Tensor, weight_B: Tensor | None) -> Tensor:
        h = self.activation(_norm(self.norm3, self.up1(h), weight_B))
        return torch.sigmoid(self.up2(h))

    def _initialise(self, std_of_all: float | None) -> None:
        """Initialise with N(0, std^2), as InfoGAN does with BatchNorm, or with He initialisation (ours) without."""
        for layer in self._layers():
            if layer.bias is not None:
                nn.init.constant_(layer.bias, 0.0)
            if std_of_all is not None:
                std = std_of_all
            elif layer is self.fc1:
                std = 1.0  # a code has unit norm, not unit variance per component
            elif isinstance(layer, nn.ConvTranspose2d):
                std = math.sqrt(2 / (layer.in_channels * 4))  # 4x4 at stride 2: four taps meet in a pixel
            else:
                std = math.sqrt(2 / layer.weight[0].numel())
            nn.init.normal_(layer.weight, std=std)

    def _initialise_as_published(self) -> None:
        """Initialise weights as yedidh/glann (model.py, weights_init); biases stay as PyTorch makes them."""
        for layer in self._layers():
            nn.init.xavier_normal_(layer.weight, gain=math.sqrt(2))

    def _layers(self) -> list[nn.Linear | nn.Conv2d | nn.ConvTranspose2d]:
        return [layer for layer in self.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]


class DcganGenerator(Generator):
    """DCGAN's generator (Radford, Metz & Chintala 2016): fc to 4x4 px (7x7 of 28), then 4x4 stride-2 transposed
    convolutions, channels halving from min(max_width, width * 2^k) down to `width`, and (tanh + 1) / 2.

    BatchNorm, where it is on, and an activation (published: ReLU) before each. Published for 64 px: width 128; that of
    PyTorch's own example is 64. `resize` upsamples and convolves as infogan's does.
    """

    def __init__(self, config: GeneratorConfig, resolution: int, channels: int) -> None:
        super().__init__(config.latent_dim, resolution, channels)
        doublings = 0
        while (side := resolution >> doublings) > START and side % 2 == 0:
            doublings += 1
        self.side, norm = side, config.batch_norm
        widths = [min(config.width << k, config.max_width) for k in range(doublings - 1, -1, -1)]
        double = _resized_convolution if config.upsample == "resize" else _transposed_convolution
        self.fc = nn.Linear(config.latent_dim, widths[0] * side**2, bias=not norm)
        self.ups = nn.ModuleList(double(fan_in, fan_out, not norm) for fan_in, fan_out in pairwise(widths))
        self.norms = nn.ModuleList(_batch_norm(config, width) for width in widths if norm)
        self.to_image = double(widths[-1], channels, True)
        self.activation = ACTIVATIONS[config.activation]
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def images(self, z_BD: Tensor, weight_B: Tensor | None) -> Tensor:
        h = self.fc(self._unit(z_BD)).view(len(z_BD), -1, self.side, self.side)
        for number, up in enumerate([*self.ups, self.to_image]):
            h = self._stage(partial(self._double, number, up), h, weight_B)
        return (torch.tanh(h) + 1) / 2

    def _double(self, number: int, up: nn.Module, h: Tensor, weight_B: Tensor | None) -> Tensor:
        if len(self.norms):
            h = self.norms[number](h, weight_B)
        out: Tensor = up(self.activation(h))
        return out


class ResNetGenerator(Generator):
    """The residual generator of Mescheder, Geiger & Nowozin 2018 for 64 to 1024 px; no BatchNorm.

    fc to 4x4, then pre-activation residual blocks with x2 nearest upsampling between them, channels
    halving from min(max_width, width * 2^k) down to `width`, a last block, a 3x3 convolution and
    (tanh + 1) / 2.  `resize` upsamples bilinearly.
    """

    def __init__(
        self, latent_dim: int, resolution: int, channels: int, *, width: int, max_width: int, resize: bool
    ) -> None:
        super().__init__(latent_dim, resolution, channels)
        doublings = int(math.log2(resolution // START))
        widths = [min(width << k, max_width) for k in range(doublings, -1, -1)]
        self.fc = nn.Linear(latent_dim, widths[0] * START**2)
        self.blocks = nn.ModuleList(
            ResidualBlock(fan_in, fan_out) for fan_in, fan_out in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.upsample = (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False) if resize else nn.Upsample(scale_factor=2)
        )
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def images(self, z_BD: Tensor, weight_B: Tensor | None) -> Tensor:
        del weight_B  # no layer mixes rows
        h = self.fc(self._unit(z_BD)).view(len(z_BD), -1, START, START)
        for block in self.blocks[:-1]:
            h = self.upsample(self._stage(block, h))
        return self._stage(self._finish, h)

    def _finish(self, h: Tensor) -> Tensor:
        h = self.to_image(F.leaky_relu(self.blocks[-1](h), 0.2))
        return (torch.tanh(h) + 1) / 2


class ResidualBlock(nn.Module):
    """h + 0.1 * conv(act(conv(act(h)))), LeakyReLU(0.2), 3x3; a 1x1 convolution where widths differ."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        hidden = min(fan_in, fan_out)
        self.conv1 = nn.Conv2d(fan_in, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, fan_out, 3, padding=1)
        self.skip = nn.Identity() if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        residual = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(h, 0.2)), 0.2))
        return self.skip(h) + 0.1 * residual


def build_generator(config: GeneratorConfig, resolution: int, channels: int) -> Generator:
    """Build G for `resolution` px: forward(z_BD, weight_B=None) -> img_BCHW in [0, 1].

    Raises:
        UserError: this kind of generator cannot make images of that resolution.
    """
    network = _network(config, resolution, channels)
    network.unit_input = config.unit_input
    if config.reference:
        network.reference_RD = torch.zeros(config.reference, config.latent_dim)
    return network


def _network(config: GeneratorConfig, resolution: int, channels: int) -> Generator:
    resize = config.upsample == "resize"
    if config.kind == "infogan":
        if resolution % 4 or not 8 <= resolution <= 64:
            raise UserError(f"generator.kind=infogan makes images of 8 to 64 px in steps of 4, not {resolution}")
        return InfoGanGenerator(config, resolution, channels)
    if config.kind == "dcgan":
        if resolution % 4 or resolution < 2 * START:
            raise UserError(f"generator.kind=dcgan makes images from 8 px in steps of 4, not {resolution}")
        return DcganGenerator(config, resolution, channels)
    if resolution < 2 * START or resolution & (resolution - 1):
        raise UserError(f"generator.kind=resnet makes images whose side is a power of two from 8, not {resolution}")
    if config.max_width < config.width:
        raise UserError(
            f"generator.max_width={config.max_width} is below generator.width={config.width}; raise max_width"
        )
    return ResNetGenerator(
        config.latent_dim, resolution, channels, width=config.width, max_width=config.max_width, resize=resize
    )


def _batch_norm(config: GeneratorConfig, channels: int) -> nn.Module:
    return VirtualBatchNorm(channels, config.reference) if config.reference else SharedBatchNorm(channels)


def _norm(layer: nn.Module | None, h: Tensor, weight_B: Tensor | None) -> Tensor:
    out: Tensor = h if layer is None else layer(h, weight_B)
    return out


def _transposed_convolution(fan_in: int, fan_out: int, bias: bool) -> nn.Module:
    return nn.ConvTranspose2d(fan_in, fan_out, 4, stride=2, padding=1, bias=bias)


def _resized_convolution(fan_in: int, fan_out: int, bias: bool) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=bias))


def generator_of(config: Config) -> Generator:
    """Build the generator of a run, with random weights."""
    network = build_generator(config.generator, config.data.resolution, config.data.channels)
    network.checkpoint_activations = config.engine.activation_checkpointing
    return network
