"""Critics: an image to a score, and to features.

Shapes: B batch, S images of a row, C channels, H = W the resolution in pixels, F features, K classes or kernels, Q
numbers of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ..config.networks import CriticConfig
from ..config.run import Config
from ..config.samplers import PriorConfig
from ..config.sections import GeneratorConfig
from ..errors import UserError
from .generators import FULLY_CONNECTED, START, InfoGanGenerator, ResidualBlock
from .norm import SharedBatchNorm
from .terms import likeness

CODE_HEAD = 128  # width of InfoGAN's head


class Judgement(NamedTuple):
    """A score and features of images; with a second axis S where S images of a row were judged.

    head_BQ: logits of the classes, or what the image says of its code (`models.labels.information`); else Q is 0.
    """

    score_B: Tensor
    features_BF: Tensor
    head_BQ: Tensor


class Critic(nn.Module):
    """Base of critics. A kind defines `features`, and `judge` where a score is not a linear function of them.

    With K classes the score is log sum_k exp(logit_k), the logit of `real` where generated images are class K + 1 with
    logit 0 (Salimans et al. 2016, Sec. 5). With kernels the last layer also sees the likeness to the rest of the batch.
    """

    def __init__(self, features: int, config: CriticConfig) -> None:
        super().__init__()
        self.count, self.classes, self.kernels = features, config.classes, config.kernels
        self.last = nn.Linear(features + config.kernels, max(config.classes, 1))
        if config.kernels:
            self.kernel = nn.Linear(features, config.kernels * config.kernel_dim, bias=False)
        self.head: nn.Module | None = None

    def forward(self, img: Tensor, weight_B: Tensor | None = None) -> Judgement:
        """Judge images [B, C, H, W], or [B, S, C, H, W]; BatchNorm sees the first of all rows, then the second ones.

        Args:
            weight_B: 0 for padding rows, which BatchNorm and kernels ignore.
        """
        if img.dim() == 4:
            return self.judge(img, weight_B)
        parts = [self.judge(part, weight_B) for part in img.unbind(1)]
        return Judgement(*(torch.stack(one, 1) for one in zip(*parts, strict=True)))

    def judge(self, img_BCHW: Tensor, weight_B: Tensor | None) -> Judgement:
        """Judge one image a row."""
        features_BF = self.features(img_BCHW, weight_B)
        logit_BK = self.last(torch.cat([features_BF, self.near(features_BF, weight_B)], 1))
        if self.classes:
            return Judgement(logit_BK.logsumexp(1), features_BF, logit_BK)
        return Judgement(
            logit_BK[:, 0], features_BF, features_BF[:, :0] if self.head is None else self.head(features_BF)
        )

    def near(self, features_BF: Tensor, weight_B: Tensor | None) -> Tensor:
        """The likeness of each row to the other ones, [B, kernels]."""
        if not self.kernels:
            return features_BF[:, :0]
        kernel_BKC = self.kernel(features_BF).view(len(features_BF), self.kernels, -1)
        return likeness(kernel_BKC.float(), features_BF.new_ones(len(features_BF)) if weight_B is None else weight_B)

    def features(self, img_BCHW: Tensor, weight_B: Tensor | None) -> Tensor:
        """Features [B, F]."""
        raise NotImplementedError


class InfoGanCritic(Critic):
    """InfoGAN's critic for 8 to 64 px (Chen et al. 2016, as used by Lucic et al. 2018).

    Two 4x4 stride-2 convolutions with w and 2w channels, fc 1024, LeakyReLU(0.2) after each, then the score; BatchNorm,
    where it is on, after the second convolution and fc 1024. w is `width`, published: 64.
    """

    def __init__(self, config: CriticConfig, resolution: int, channels: int) -> None:
        if resolution % 4 or not 8 <= resolution <= 64:
            raise UserError(f"networks.critic.kind=infogan sees images of 8 to 64 px in steps of 4, not {resolution}")
        super().__init__(FULLY_CONNECTED, config)
        width, biased = config.width, not config.batch_norm
        self.conv1 = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=biased)
        self.fc = nn.Linear(2 * width * (resolution // 4) ** 2, FULLY_CONNECTED, bias=biased)
        self.norm1 = SharedBatchNorm(2 * width) if config.batch_norm else None
        self.norm2 = SharedBatchNorm(FULLY_CONNECTED) if config.batch_norm else None
        initialise(self)

    def features(self, img_BCHW: Tensor, weight_B: Tensor | None) -> Tensor:
        h = F.leaky_relu(self.conv1(img_BCHW), 0.2)
        h = F.leaky_relu(normalised(self.norm1, self.conv2(h), weight_B), 0.2)
        return F.leaky_relu(normalised(self.norm2, self.fc(h.flatten(1)), weight_B), 0.2)


class DcganCritic(Critic):
    """DCGAN's critic (Radford, Metz & Chintala 2016): 4x4 stride-2 convolutions only, channels doubling from `width`.

    LeakyReLU(0.2), and BatchNorm, where it is on, after all but the first; down to a side of 4 px, or to the last even
    one (7 px of 28).
    """

    def __init__(self, config: CriticConfig, resolution: int, channels: int) -> None:
        halvings = 0
        while (side := resolution >> halvings) > START and side % 2 == 0:
            halvings += 1
        widths = [channels, *(config.width << k for k in range(halvings))]
        super().__init__(widths[-1] * side**2, config)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for number, (fan_in, fan_out) in enumerate(pairwise(widths)):
            norm = config.batch_norm and number > 0
            self.convs.append(nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1, bias=not norm))
            self.norms.append(SharedBatchNorm(fan_out) if norm else nn.Identity())
        initialise(self)

    def features(self, img_BCHW: Tensor, weight_B: Tensor | None) -> Tensor:
        h = img_BCHW
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = conv(h)
            h = F.leaky_relu(norm(h, weight_B) if isinstance(norm, SharedBatchNorm) else norm(h), 0.2)
        return h.flatten(1)


class ResNetCritic(Critic):
    """The residual critic of Mescheder, Geiger & Nowozin 2018, the mirror of the resnet generator; no BatchNorm.

    A 3x3 convolution, then pre-activation residual blocks with 3x3 stride-2 average pooling between them, channels
    doubling from `width` up to `max_width`, down to a side of 4 px.
    """

    def __init__(self, config: CriticConfig, resolution: int, channels: int) -> None:
        if resolution < 2 * START or resolution & (resolution - 1):
            raise UserError(
                f"networks.critic.kind=resnet sees images whose side is a power of two from 8, not {resolution}"
            )
        halvings = int(math.log2(resolution // START))
        widths = [min(config.width << k, config.max_width) for k in range(halvings + 1)]
        super().__init__(widths[-1] * START**2, config)
        self.from_image = nn.Conv2d(channels, widths[0], 3, padding=1)
        ends = zip([widths[0], *widths[:-1]], widths, strict=True)
        self.blocks = nn.ModuleList(ResidualBlock(fan_in, fan_out) for fan_in, fan_out in ends)

    def features(self, img_BCHW: Tensor, weight_B: Tensor | None) -> Tensor:
        del weight_B  # no layer mixes rows
        h = self.from_image(img_BCHW)
        for block in self.blocks[:-1]:
            h = F.avg_pool2d(block(h), 3, stride=2, padding=1)
        return F.leaky_relu(self.blocks[-1](h), 0.2).flatten(1)


class AutoencoderCritic(Critic):
    """An autoencoder whose score is its mean absolute error (BEGAN's L; EBGAN's D, there with squares).

    The encoder is that of the InfoGAN critic down to `code_dim` numbers, the features; the decoder InfoGAN's generator.
    """

    def __init__(self, config: CriticConfig, resolution: int, channels: int) -> None:
        super().__init__(FULLY_CONNECTED, config)
        self.last = nn.Linear(FULLY_CONNECTED, config.code_dim)
        self.encoder = InfoGanCritic(config, resolution, channels)
        del self.encoder.last
        mirror = GeneratorConfig(
            kind="infogan", latent_dim=config.code_dim, width=config.width, batch_norm=config.batch_norm
        )
        self.decoder = InfoGanGenerator(mirror, resolution, channels)

    def judge(self, img_BCHW: Tensor, weight_B: Tensor | None) -> Judgement:
        code_BF = self.last(self.encoder.features(img_BCHW, weight_B))
        error = self.decoder(code_BF, weight_B) - img_BCHW
        return Judgement(error.abs().flatten(1).mean(1), code_BF, code_BF[:, :0])


class MlpCritic(Critic):
    """Two hidden layers of `width` units with LeakyReLU(0.2), of images of any size, or of codes as images of 1 px.

    The critic of codes of Makhzani et al. 2016 (App. A.1: two hidden layers of 1000 ReLU units).
    """

    def __init__(self, config: CriticConfig, resolution: int, channels: int) -> None:
        super().__init__(config.width, config)
        self.fc1 = nn.Linear(channels * resolution**2, config.width)
        self.fc2 = nn.Linear(config.width, config.width)
        initialise(self)

    def features(self, img_BCHW: Tensor, weight_B: Tensor | None) -> Tensor:
        del weight_B  # no layer mixes rows
        h = F.leaky_relu(self.fc1(img_BCHW.flatten(1)), 0.2)
        return F.leaky_relu(self.fc2(h), 0.2)


KINDS: dict[str, Callable[[CriticConfig, int, int], Critic]] = {
    "infogan": InfoGanCritic,
    "dcgan": DcganCritic,
    "resnet": ResNetCritic,
    "autoencoder": AutoencoderCritic,
    "mlp": MlpCritic,
}


def build_critic(config: CriticConfig, resolution: int, channels: int, code: int = 0) -> Critic:
    """Build a critic: forward(img_BCHW, weight_B=None) -> Judgement.

    With `code` it has InfoGAN's head of so many numbers: fc 128, LeakyReLU(0.2), fc, on the features of the critic.

    With `spectral_norm` every convolution and matrix is divided by its largest singular value, from one power
    iteration a pass (Miyato et al. 2018, Sec. 2.1).

    Raises:
        UserError: this kind of critic cannot see images of that resolution.
    """
    critic = KINDS[config.kind](config, resolution, channels)
    if code:
        critic.head = nn.Sequential(nn.Linear(critic.count, CODE_HEAD), nn.LeakyReLU(0.2), nn.Linear(CODE_HEAD, code))
    if config.spectral_norm:
        for layer in list(critic.modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                spectral_norm(layer)
    return critic


def critic_of(config: Config) -> Critic:
    """Build the critic of a run, with random weights."""
    keys, channels = config.networks, config.data.channels + label_maps(config)
    code = cast(PriorConfig, config.sampler).categories + keys.continuous if keys.information else 0
    return build_critic(keys.critic, config.data.resolution, channels, code)


def adversary_of(config: Config) -> Critic:
    """Build the critic in the training of an autoencoder, with random weights; codes are images of 1 px to it."""
    keys = config.autoencoder.adversary
    if keys.judges == "codes":
        return build_critic(keys.critic, 1, config.generator.latent_dim)
    return build_critic(keys.critic, config.data.resolution, config.data.channels)


def label_maps(config: Config) -> int:
    """Channels for the label of an image."""
    return cast(PriorConfig, config.sampler).categories if config.networks.condition else 0


def initialise(critic: Critic) -> None:
    """N(0, 0.02^2), and no biases, as DCGAN and InfoGAN."""
    for layer in critic.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def normalised(layer: SharedBatchNorm | None, h: Tensor, weight_B: Tensor | None) -> Tensor:
    return h if layer is None else layer(h, weight_B)
