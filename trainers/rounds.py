"""One batch of a game: an update of a critic, and updates of the generator.

Random numbers are functions of (seed, epoch, row), losses are per row, and statistics of batches are merged over all
workers: neither resuming nor the number of workers changes a step.

Shapes: B rows of this worker's batch, D latent dimension, C, H, W channels, height, width, K numbers of a piggyback.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..config.networks import NetworksConfig
from ..config.run import Config
from ..datasets.loader import Batch
from ..datasets.reader import ImageRows
from ..models.critics import Judgement
from ..models.labels import class_loss, information, with_category, with_maps
from ..models.mapping import NoiseToCode
from ..models.noise import Stream, noise, uniform
from ..models.norm import frozen_statistics
from ..models.objectives.base import Objective, Scores
from ..models.objectives.named import objective_of
from ..models.penalties import penalty
from ..models.terms import feature_matching, pull_away
from ..samplers.prior import Prior
from .engine.step import Engine, StepResult
from .labelled import Labelled, labelled_of, labels_of
from .prior import prior_of
from .refinement import Refinement, facts_of_terms

# Sums of a critic's step: rows, right decisions, scores of real and of generated images, rows with a label, rows that
# are classified rightly, and the information of generated images about their codes.
MEASURES = 7


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
        rows, right, real, fake, known, hits, information = summed
        if not all(map(math.isfinite, summed)) or not rows:
            return {}
        self.accuracy, real, fake = right / rows, real / rows, fake / rows
        facts = {"real_score": real, "fake_score": fake, "critic_gap": real - fake}
        if objective.rebalanced is not None:
            self.balance = objective.rebalanced(self.balance, real, fake)
            facts["balance"] = self.balance
        if known:
            facts["class_accuracy"] = hits / known
        if self.engine.network.head is not None:
            facts["information"] = information / rows
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


@dataclass(frozen=True, eq=False)
class Game:
    """What all batches have in common. prior: normal noise to codes. label_N: of every row, where they are seen.

    refinement: of a generator whose images have codes.
    """

    config: Config
    objective: Objective
    prior: NoiseToCode
    generator: Engine
    label_N: np.ndarray | None = None
    labelled: Labelled | None = None
    refinement: Refinement | None = None

    @classmethod
    def of(cls, config: Config, images: ImageRows, generator: Engine, refinement: Refinement | None = None) -> Game:
        objective = objective_of(config.networks.objective)
        if refinement is not None:
            return cls(config, objective, refinement.sampler, generator, refinement=refinement)
        label_N, prior = labels_of(config, images), prior_of(config).to(generator.device)
        labelled = labelled_of(config, images, label_N, generator.device)
        return cls(config, objective, prior, generator, label_N, labelled)

    @property
    def categories(self) -> int:
        """Categories that a code says."""
        return cast(Prior, self.prior).categories

    def round(self, epoch: int, batch: Batch, scale: float) -> Round:
        """The round of a batch as it was read; scale: factor of the learning rates."""
        device = self.generator.device
        real_BCHW = batch.img_BCHW.to(device, non_blocking=True).float() / 255
        weight_B, rows_B = (part.to(device, non_blocking=True) for part in (batch.weight_B, batch.rows_B))
        label_B = torch.full_like(rows_B, -1)
        if self.label_N is not None:
            label_B = torch.as_tensor(self.label_N[batch.rows_B.numpy()], device=device).long()
        own_BD = None if self.refinement is None else self.refinement.codes_of(batch.rows_B, batch.weight_B)
        return Round(self, epoch, rows_B, real_BCHW, label_B, weight_B, scale, own_BD)


@dataclass(frozen=True, eq=False)
class Round:
    """A batch of real images. weight_B: 0 for padding and unreadable rows. label_B: -1 where none is seen."""

    game: Game
    epoch: int
    rows_B: Tensor
    real_BCHW: Tensor
    label_B: Tensor
    weight_B: Tensor
    scale: float
    own_BD: Tensor | None = None  # codes of the images, of a refinement

    @property
    def networks(self) -> NetworksConfig:
        return self.game.config.networks

    def codes(self, draw: int) -> Tensor:
        """Fresh codes z_BD; draw 0 is the critic's, those from 1 on are the generator's."""
        number, prior = self.epoch * (1 + self.networks.generator_steps) + draw, self.game.prior
        with torch.no_grad():
            device, seed = self.rows_B.device, self.game.config.seed
            code_BD = prior(noise(seed, number, self.rows_B, prior.noise_dim, device, Stream.PRIOR))
        if self.own_BD is not None:
            return torch.where(self.paired(draw)[:, None], self.own_BD, code_BD)
        return with_category(code_BD, self.label_B, self.game.categories) if self.networks.condition else code_BD

    def paired(self, draw: int) -> Tensor:
        """Which rows carry the codes of their images in a draw, bool [B]: by chance, 1 in 1 + `networks.generated`."""
        number = self.epoch * (1 + self.networks.generator_steps) + draw
        e_B1 = noise(self.game.config.seed, number, self.rows_B, 1, self.rows_B.device, Stream.PAIRED)
        return (uniform(e_B1[:, 0]) < 1 / (1 + self.networks.generated)) & (self.weight_B > 0)

    def seen(self, img_BCHW: Tensor, part: slice = slice(None)) -> Tensor:
        """Images as critics see them: with their labels, where these are a condition."""
        if not self.networks.condition:
            return img_BCHW
        return with_maps(img_BCHW, self.label_B[part], self.game.categories)

    def information(self, judged_BQ: Tensor, code_BD: Tensor) -> Tensor:
        """What generated images say of their codes, per row."""
        return information(judged_BQ.float(), code_BD, self.game.categories, self.networks.continuous)

    def critic_step(self, player: Player, piggyback_K: Tensor) -> CriticStep:
        """Update a critic by fresh images."""
        code_BD = self.codes(0)
        return self.judge(player, self.game.generator.draw(code_BD, self.weight_B), piggyback_K, code_BD)

    def judge(self, player: Player, fake_BCHW: Tensor, piggyback_K: Tensor, code_BD: Tensor) -> CriticStep:
        """Update a critic, unless it is too good already, and what depends on the scores of all workers.

        Args:
            fake_BCHW: what it is to tell from the real images, made of `code_BD`.
        """
        networks, critic, objective, seed = self.networks, player.engine, self.game.objective, self.game.config.seed
        shown, class_B = [self.seen(fake_BCHW), self.seen(self.real_BCHW)], None
        if self.game.labelled is not None:
            known_BCHW, class_B = self.game.labelled.draw(seed, self.epoch, self.rows_B)
            shown.append(known_BCHW)
        sent_K = torch.cat([torch.zeros(MEASURES), piggyback_K]).to(critic.device)
        measured = sent_K[:MEASURES]  # set while the loss is computed, and summed with it

        def loss_of(judged: Judgement, part: slice) -> Tensor:
            fake_B, real_B = judged.score_B[:, :2].float().unbind(1)
            images, rows_B, weight_B = (self.real_BCHW[part], fake_BCHW[part]), self.rows_B[part], self.weight_B[part]
            gap_B = (images[0] - images[1]).abs().flatten(1).mean(1) if objective.needs_gap else 0.0
            loss_B = objective.critic(Scores(real_B, fake_B, gap_B, player.balance))
            if (kind := networks.penalty.kind) != "none":
                slope_B = penalty(kind, lambda x: score(critic, self.seen(x, part)), *images, seed, self.epoch, rows_B)
                loss_B = loss_B + networks.penalty.weight * slope_B
            known_B = hit_B = bound_B = torch.zeros_like(real_B)
            if class_B is not None:
                loss_B = loss_B + class_loss(judged.head_BQ[:, 2].float(), class_B[part])
                known_B = (self.label_B[part] >= 0).float()
                hit_B = (judged.head_BQ[:, 1].argmax(1) == self.label_B[part]).float()
            if networks.information:
                bound_B = self.information(judged.head_BQ[:, 0], code_BD[part])
                loss_B = loss_B - networks.information * bound_B
            right_B = 0.5 * ((real_B > 0).float() + (fake_B < 0).float())
            seen = torch.stack([torch.ones_like(real_B), right_B, real_B, fake_B, known_B, hit_B, bound_B]).detach()
            measured.add_(torch.where(weight_B > 0, seen, 0.0).sum(1))
            return loss_B

        held = player.accuracy > networks.gate
        inputs = torch.stack(shown, 1)
        result = critic.step(inputs, self.weight_B, loss_of, networks.critic.lr * self.scale, sent_K, hold=held)
        summed, carried_K = result.piggyback_K[:MEASURES].tolist(), result.piggyback_K[MEASURES:]
        facts = player.measure(summed, objective) if result.applied or held else {}
        return CriticStep(result.loss, result.applied or held, carried_K, facts)

    def generator_step(self, players: Sequence[Player], draw: int) -> StepResult:
        """Update the generator against all critics."""
        networks, objective, code_BD = self.networks, self.game.objective, self.codes(draw)
        terms, refinement = None, self.game.refinement
        if refinement is not None:
            terms = refinement.terms(self.real_BCHW, code_BD, self.paired(draw), self.epoch, self.rows_B)

        def loss_of(fake_BCHW: Tensor, part: slice) -> Tensor:
            real_BCHW, weight_B = self.seen(self.real_BCHW[part], part), self.weight_B[part]
            losses = []
            for player in players:
                fake, real = player.engine.local(self.seen(fake_BCHW, part), weight_B), None
                if objective.needs_real or networks.feature_matching:
                    with torch.no_grad():
                        real = player.engine.local(real_BCHW, weight_B)
                real_B = fake.score_B.detach() if real is None else real.score_B
                loss_B = networks.adversarial * objective.generator(Scores(real_B.float(), fake.score_B.float()))
                if real is not None and networks.feature_matching:
                    matched = feature_matching(fake.features_BF.float(), real.features_BF.float(), weight_B)
                    loss_B = loss_B + networks.feature_matching * matched
                if networks.pull_away:
                    loss_B = loss_B + networks.pull_away * pull_away(fake.features_BF.float(), weight_B)
                if networks.information:
                    loss_B = loss_B - networks.information * self.information(fake.head_BQ, code_BD[part])
                losses.append(loss_B)
            if terms is not None:
                losses.append(terms.loss(fake_BCHW, weight_B, part))
            return torch.stack(losses).sum(0)

        lr, sums_K = networks.rate_of_generator * self.scale, None if terms is None else terms.sums_K
        with watching([player.engine.network for player in players]):
            return self.game.generator.step(code_BD, self.weight_B, loss_of, lr, sums_K)


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


def facts_of(judged: Sequence[CriticStep], made: Sequence[StepResult]) -> dict[str, float]:
    """Numbers of a batch: of each critic, and the generator's mean loss over its updates."""
    facts = {
        name if number == 1 else f"{name}_{number}": value
        for number, step in enumerate(judged, 1)
        for name, value in step.facts.items()
    }
    for step in made:
        facts |= facts_of_terms(step)
    losses = [step.loss for step in made if step.loss is not None]
    return facts | ({"generator_loss": math.fsum(losses) / len(losses)} if losses else {})
