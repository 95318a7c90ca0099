"""What the published single-process code (github.com/yedidh/glann) computes in a step and in an epoch, on the CPU.

Written anew after that code, without its calls to CUDA: the same operations in the same order, so that a benchmark can
time both sides. Features have random weights, which are as fast as trained ones.

Legend: B batch, D latent dimension, E noise dimension, N rows, C, H, W channels, height, width.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAPS = (2, 7, 12, 21, 30)  # layers of VGG-16's features; the ReLU after each works in place, but for the last
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: pooling


class Generator(nn.Module):
    """InfoGAN's generator for 28 px, one channel; BatchNorm after the second layer and the first convolution."""

    def __init__(self, dim: int, side: int = 28) -> None:
        super().__init__()
        self.side = side // 4
        flat = 128 * self.side**2
        self.lin_in, self.lin_im = nn.Linear(dim, 1024, bias=False), nn.Linear(1024, flat, bias=False)
        self.bn_im, self.bn_conv = nn.BatchNorm1d(flat), nn.BatchNorm2d(64)
        self.conv1, self.conv2 = nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ConvTranspose2d(64, 1, 4, 2, 1)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, z_BD: Tensor) -> Tensor:
        z_BD = z_BD.div(z_BD.norm(2, 1).detach().unsqueeze(1).expand_as(z_BD))
        h = self.act(self.bn_im(self.lin_im(self.act(self.lin_in(z_BD)))))
        h = self.conv1(h.view(-1, 128, self.side, self.side))
        return torch.sigmoid(self.conv2(self.act(self.bn_conv(h))))


def vgg16(count: int | None = None) -> nn.Sequential:
    """The first layers of VGG-16's features; all up to the last convolution's ReLU without `count`."""
    layers: list[nn.Module] = []
    channels = 3
    for width in WIDTHS:
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers[:count])


class GloStep:
    """A step of stage 1 on digits: a dense Adam over all codes, features with a graph for both images.

    frozen: whether the weights of the features need no gradient, which that code forgets.
    """

    def __init__(self, img_NCHW: Tensor, dim: int, batch: int, levels: int, frozen: bool) -> None:
        self.img_NCHW, self.batch, self.levels = img_NCHW, batch, levels
        self.codes, self.generator = nn.Embedding(len(img_NCHW), dim), Generator(dim)
        nn.init.normal_(self.codes.weight, std=0.01)
        self.features = vgg16(TAPS[levels - 1] + 1).requires_grad_(not frozen)
        self.of_generator = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.of_codes = torch.optim.Adam(self.codes.parameters(), lr=1e-2, betas=(0.5, 0.999))

    def __call__(self) -> float:
        index_B = torch.randint(len(self.img_NCHW), (self.batch,))
        self.codes.zero_grad()
        self.generator.zero_grad()
        fake = self.generator(self.codes(index_B))
        fake = F.pad(fake.expand(-1, 3, -1, -1), (2, 2, 2, 2))
        real = F.pad(self.img_NCHW[index_B].float().expand(-1, 3, -1, -1), (2, 2, 2, 2))
        loss = self.distance(2 * fake - 1, 2 * real - 1).mean()
        loss.backward()
        self.of_generator.step()
        self.of_codes.step()
        return loss.item()

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        maps = zip([one, *self.maps(one)], [other, *self.maps(other)], strict=True)
        return torch.stack([torch.abs(a - b).reshape(len(one), -1).mean(1) for a, b in maps]).sum(0)

    def maps(self, img: Tensor) -> list[Tensor]:
        found = []
        for number, layer in enumerate(self.features):
            img = layer(img)
            if number in TAPS[: self.levels]:
                found.append(img)
        return found


class ImleEpoch:
    """An epoch of stage 2: candidates in batches through float64 arrays, faiss's flat index, one Adam an epoch."""

    def __init__(self, z_ND: np.ndarray, noise_dim: int, batch: int) -> None:
        self.z_ND, self.noise_dim, self.batch = z_ND, noise_dim, batch
        dim = z_ND.shape[1]
        self.mapping = nn.Sequential(
            nn.Linear(noise_dim, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(True),
            nn.Linear(128, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(True),
            nn.Linear(128, dim, bias=False),
        )

    def __call__(self) -> float:
        rows, dim = self.z_ND.shape
        steps, size = rows // self.batch, self.batch
        optimizer = torch.optim.Adam(self.mapping.parameters(), lr=1e-3, betas=(0.5, 0.999), weight_decay=1e-5)
        order_N, criterion = np.random.permutation(rows), nn.MSELoss()
        e_ME, mapped_MD = np.zeros((2 * steps * size, self.noise_dim)), np.zeros((2 * steps * size, dim))
        self.mapping.train()
        for step in range(2 * steps):
            e_BE = torch.randn(size, self.noise_dim)
            here = slice(step * size, (step + 1) * size)
            mapped_BD = self.mapping(e_BE)
            e_ME[here], mapped_MD[here] = e_BE.numpy(), mapped_BD.data.numpy()
        index = faiss.IndexFlatL2(dim)
        index.add(mapped_MD.astype("float32"))
        nearest_N = index.search(self.z_ND.astype("float32"), 1)[1].squeeze(1)
        error = 0.0
        for step in range(steps):
            self.mapping.zero_grad()
            own_B = order_N[step * size + np.arange(size)]
            e_BE = torch.from_numpy(e_ME[nearest_N[own_B]]).float()
            loss = criterion(self.mapping(e_BE), torch.from_numpy(self.z_ND[own_B]).float())
            loss.backward()
            error += loss.item()
            optimizer.step()
        return error / steps
