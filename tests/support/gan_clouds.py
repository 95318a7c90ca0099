"""A generator and a critic of two dimensions, trained on a cloud of modes by the objectives and penalties of glann.

Shapes: B points, 2 dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from code_clouds import CLOUDS
from glann.config.networks import OF_ERRORS, ObjectiveConfig
from glann.models.objectives.base import Scores
from glann.models.objectives.named import objective_of
from glann.models.penalties import penalty
from torch import Tensor, nn

BATCH, CODE, WIDTH = 256, 2, 128


def mlp(*widths: int) -> nn.Sequential:
    """Fully connected layers with LeakyReLU(0.2) between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


@dataclass
class Game:
    """The two networks. kind, weight: of the penalty. lr: falls to 0 over the steps."""

    objective: ObjectiveConfig
    cloud: str
    kind: str = "none"
    weight: float = 1.0
    lr: float = 1e-3
    seed: int = 0
    balance: float = 0.0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.generator = mlp(CODE, WIDTH, WIDTH, WIDTH, 2)
        self.reproduces = self.objective.kind in OF_ERRORS[:2]  # the score is an error
        self.network = mlp(2, WIDTH, WIDTH, 1, WIDTH, 2) if self.reproduces else mlp(2, WIDTH, WIDTH, WIDTH, 1)
        self.played = objective_of(self.objective)

    def score(self, x_B2: Tensor) -> Tensor:
        """The critic's scores of points, [B]."""
        if self.reproduces:
            return (self.network(x_B2) - x_B2).abs().mean(1)
        score_B: Tensor = self.network(x_B2)[:, 0]
        return score_B

    def train(self, steps: int) -> None:
        centre_M2, deviation = CLOUDS[self.cloud]()
        adams = [torch.optim.Adam(part.parameters(), self.lr, (0.0, 0.9)) for part in (self.network, self.generator)]
        for step in range(steps):
            for adam in adams:
                adam.param_groups[0]["lr"] = self.lr * (1 - step / steps)
            real_B2 = centre_M2[torch.randint(len(centre_M2), (BATCH,))] + deviation * torch.randn(BATCH, 2)
            update(adams[0], self.critic_loss(real_B2, self.generator(torch.randn(BATCH, CODE)).detach(), step))
            fake_B = self.score(self.generator(torch.randn(BATCH, CODE)))
            update(adams[1], self.played.generator(Scores(self.score(real_B2).detach(), fake_B)))

    def critic_loss(self, real_B2: Tensor, fake_B2: Tensor, step: int) -> Tensor:
        """The critic's loss per row; BEGAN's balance moves on."""
        gap_B = (real_B2 - fake_B2).abs().mean(1)
        scores = Scores(self.score(real_B2), self.score(fake_B2), gap_B, self.balance)
        loss_B = self.played.critic(scores)
        if self.played.rebalanced is not None:
            self.balance = self.played.rebalanced(
                self.balance, float(scores.real_B.mean()), float(scores.fake_B.mean())
            )
        if self.kind == "none":
            return loss_B
        return loss_B + self.weight * penalty(
            self.kind, self.score, real_B2, fake_B2, self.seed, step, torch.arange(BATCH)
        )

    @torch.no_grad()
    def draw(self, count: int) -> Tensor:
        """Points [count, 2] of fixed noise."""
        drawn_B2: Tensor = self.generator(torch.randn(count, CODE, generator=torch.Generator().manual_seed(7)))
        return drawn_B2


def update(adam: torch.optim.Optimizer, loss_B: Tensor) -> None:
    """One step on the mean loss."""
    adam.zero_grad()
    loss_B.mean().backward()
    adam.step()
