"""One batch of a game: an update of a critic, and updates of the generator.

Random numbers are functions of (seed, epoch, row), losses are per row, and statistics of batches are merged over all
workers: neither resuming nor the number of workers changes a step.

Shapes: B rows of this worker's batch, D latent dimension, C, H, W channels, height, width, K numbers of a piggyback.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cluster.placement import ranges
from ..config.run import Config
from ..datasets.loader import Batch
from ..models.comm import rank, world_size
from ..models.critics import Judgement
from ..models.noise import Stream, noise
from ..models.norm import frozen_statistics
from ..models.objectives.base import Objective, Scores
from ..models.penalties import penalty
from ..models.terms import feature_matching, pull_away
from ..samplers.base import build_network
from .engine.step import Engine, StepResult

MEASURES = 4  # numbers of a critic's step: rows, right decisions, sums of the scores of real and of generated images


@dataclass
class Player:
    """A critic in training.

    balance: k of BEGAN. accuracy: share of the images of its last batch that it classified rightly.
    """

    engine: Engine
    balance: float = 0.0
    accuracy: float = 0.0

    @classmethod
    def resumed(cls, engine: Engine, state: Mapping[str, Any] | None) -> Player:
        """The critic as it was `saved`, or a new one."""
        return cls(engine, *(() if state is None else state["player"]["measured"].tolist()))

    def saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of its engine with the numbers that decide on its next steps."""
        measured = torch.tensor([self.balance, self.accuracy], dtype=torch.float64)
        return state | {"player": {"measured": measured}}

    def measure(self, summed: Sequence[float], objective: Objective) -> dict[str, float]:
        """Take in the sums of a batch over all workers; returns what to report."""
        rows, right, real, fake = summed
        if not all(map(math.isfinite, summed)) or not rows:
            return {}
        self.accuracy, real, fake = right / rows, real / rows, fake / rows
        facts = {"real_score": real, "fake_score": fake}
        if objective.rebalanced is not None:
            self.balance = objective.rebalanced(self.balance, real, fake)
            facts["balance"] = self.balance
        return facts


@dataclass(frozen=True)
class CriticStep:
    """Result of a critic's step: see `StepResult`. applied: also true if `networks.gate` held it back.

    facts: mean scores and what follows from them, of all workers.
    """

    loss: float | None
    applied: bool
    piggyback_K: Tensor
    facts: dict[str, float]


@dataclass(frozen=True)
class Round:
    """A batch of real images, and who plays with it.

    prior: normal noise to codes. weight_B: 0 for padding and unreadable rows. scale: factor of the learning rates.
    """

    config: Config
    objective: Objective
    prior: nn.Module
    generator: Engine
    epoch: int
    rows_B: Tensor
    real_BCHW: Tensor
    weight_B: Tensor
    scale: float

    @classmethod
    def of(
        cls,
        config: Config,
        objective: Objective,
        prior: nn.Module,
        generator: Engine,
        epoch: int,
        batch: Batch,
        scale: float,
    ) -> Round:
        """The round of a batch as it was read."""
        device = generator.device
        real_BCHW = batch.img_BCHW.to(device, non_blocking=True).float() / 255
        weight_B = batch.weight_B.to(device, non_blocking=True)
        rows_B = batch.rows_B.to(device, non_blocking=True)
        return cls(config, objective, prior, generator, epoch, rows_B, real_BCHW, weight_B, scale)

    def codes(self, draw: int) -> Tensor:
        """Fresh codes z_BD; draw 0 is the critic's, those from 1 on are the generator's."""
        number = self.epoch * (1 + self.config.networks.generator_steps) + draw
        dim, device = self.config.generator.latent_dim, self.generator.device
        with torch.no_grad():
            return self.prior(noise(self.config.seed, number, self.rows_B, dim, device, Stream.PRIOR))

    def critic_step(self, player: Player, piggyback_K: Tensor) -> CriticStep:
        """Update a critic, unless it is too good already, and what depends on the scores of all workers."""
        networks, critic = self.config.networks, player.engine
        fake_BCHW = self.generator.draw(self.codes(0), self.weight_B)
        sent_K = torch.cat([torch.zeros(MEASURES), piggyback_K]).to(critic.device)
        measured = sent_K[:MEASURES]  # set while the loss is computed, and summed with it

        def loss_of(judged: Judgement, part: slice) -> Tensor:
            fake_B, real_B = judged.score_B.float().unbind(1)
            images, rows_B, weight_B = (self.real_BCHW[part], fake_BCHW[part]), self.rows_B[part], self.weight_B[part]
            gap_B = (images[0] - images[1]).abs().flatten(1).mean(1) if self.objective.needs_gap else 0.0
            loss_B = self.objective.critic(Scores(real_B, fake_B, gap_B, player.balance))
            if (kind := networks.penalty.kind) != "none":
                slope_B = penalty(kind, lambda x: score(critic, x), *images, self.config.seed, self.epoch, rows_B)
                loss_B = loss_B + networks.penalty.weight * slope_B
            right_B = 0.5 * ((real_B > 0).float() + (fake_B < 0).float())
            seen = torch.stack([torch.ones_like(real_B), right_B, real_B, fake_B]).detach()
            measured.add_(torch.where(weight_B > 0, seen, 0.0).sum(1))
            return loss_B

        held = player.accuracy > networks.gate
        both = torch.stack([fake_BCHW, self.real_BCHW], 1)
        result = critic.step(both, self.weight_B, loss_of, networks.critic.lr * self.scale, sent_K, hold=held)
        summed, carried_K = result.piggyback_K[:MEASURES].tolist(), result.piggyback_K[MEASURES:]
        facts = player.measure(summed, self.objective) if result.applied or held else {}
        return CriticStep(result.loss, result.applied or held, carried_K, facts)

    def generator_step(self, players: Sequence[Player], draw: int) -> StepResult:
        """Update the generator against all critics."""
        networks = self.config.networks

        def loss_of(fake_BCHW: Tensor, part: slice) -> Tensor:
            real_BCHW, weight_B = self.real_BCHW[part], self.weight_B[part]
            losses = []
            for player in players:
                fake, real = player.engine.local(fake_BCHW, weight_B), None
                if self.objective.needs_real or networks.feature_matching:
                    with torch.no_grad():
                        real = player.engine.local(real_BCHW, weight_B)
                real_B = fake.score_B.detach() if real is None else real.score_B
                loss_B = self.objective.generator(Scores(real_B.float(), fake.score_B.float()))
                if real is not None and networks.feature_matching:
                    matched = feature_matching(fake.features_BF.float(), real.features_BF.float(), weight_B)
                    loss_B = loss_B + networks.feature_matching * matched
                if networks.pull_away:
                    loss_B = loss_B + networks.pull_away * pull_away(fake.features_BF.float(), weight_B)
                losses.append(loss_B)
            return torch.stack(losses).sum(0)

        with watching([player.engine.network for player in players]):
            return self.generator.step(self.codes(draw), self.weight_B, loss_of, networks.generator_lr * self.scale)


@contextmanager
def watching(critics: Sequence[nn.Module]) -> Iterator[None]:
    """Critics pass gradients on, and learn nothing."""
    for critic in critics:
        critic.requires_grad_(False)
    try:
        with frozen_statistics(nn.ModuleList(critics)):
            yield
    finally:
        for critic in critics:
            critic.requires_grad_(True)


def score(critic: Engine, img_BCHW: Tensor) -> Tensor:
    """The scores of images, [B]."""
    return critic.local(img_BCHW, torch.ones(len(img_BCHW), device=img_BCHW.device)).score_B.float()


class Sums:
    """Means over the steps of an epoch."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, judged: Sequence[CriticStep], made: Sequence[StepResult]) -> None:
        for number, step in enumerate(judged):
            for name, value in step.facts.items():
                self.values[name if number == 0 else f"{name}_{number + 1}"].append(value)
        self.values["generator_loss"] += [step.loss for step in made if step.loss is not None]

    def means(self) -> dict[str, float]:
        return {name: math.fsum(values) / len(values) for name, values in self.values.items() if values}


def prior_of(config: Config) -> nn.Module:
    """The distribution of codes, a function of normal noise."""
    return build_network(config.sampler, config.generator.latent_dim, config.glo.constraint)


def prior_codes(config: Config, count: int) -> Tensor:
    """This worker's part of `count` codes of the prior, always the same ones."""
    own = ranges(count, world_size())[rank()]
    index_n = torch.arange(own.start, own.stop)
    return prior_of(config)(noise(config.seed, 0, index_n, config.generator.latent_dim, stream=Stream.STATISTICS))
