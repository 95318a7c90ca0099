"""A critic in the training of an autoencoder: of its images (VAE-GAN) or of its codes (adversarial autoencoder).

Of images (Larsen et al. 2016): the critic learns to score images above reconstructions and above images of fresh codes,
of which each row shows one or the other. G is trained against it by both, and to reconstruct in the critic's features,
which the encoder follows. The encoder has no part in the critic's objective, as published: G makes the images that are
judged a second time, of codes that get none of the gradient. Of codes (Makhzani et al. 2016): the critic learns to
score codes of the prior above those of the encoder, which is trained against it.

Shapes: B rows of this worker's batch, R = 2 B codes for G, D latent dimension, C, H, W channels, height, width, F
features, K numbers of a piggyback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..config.run import Config
from ..models.critics import Critic, adversary_of
from ..models.mapping import NoiseToCode
from ..models.noise import Stream, noise
from ..models.objectives.base import Scores
from ..models.objectives.named import objective_of
from ..models.patches import patch_seeds
from .engine.build import build_engine
from .engine.optimizer import OptimizerConfig
from .engine.step import Engine
from .passes import Turn
from .prior import prior_of
from .rounds import CriticStep, Game, Player, Round
from .stage import State

ReconstructionLoss = Callable[[Tensor], Tensor]  # fake [B, C, H, W] -> loss_B


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch of images on the device. e_BD: noise on their codes. seed_B: of their patches."""

    rows_B: Tensor
    real_BCHW: Tensor
    weight_B: Tensor
    e_BD: Tensor
    seed_B: Tensor

    @classmethod
    def of(cls, config: Config, turn: Turn, device: torch.device) -> Rows:
        batch, dim = turn.batch, config.generator.latent_dim
        rows_B = batch.rows_B.to(device, non_blocking=True)
        return cls(
            rows_B,
            batch.img_BCHW.to(device, non_blocking=True).float() / 255,
            batch.weight_B.to(device, non_blocking=True),
            noise(config.seed, turn.epoch, rows_B, dim, device, Stream.POSTERIOR),
            patch_seeds(config.seed, turn.epoch, batch.rows_B),
        )


class Adversary:
    """The critic of an autoencoder on one worker. judges: `images` or `codes`."""

    def __init__(self, config: Config, player: Player, generator: Engine) -> None:
        keys = config.autoencoder
        networks = keys.adversary.networks(keys.epochs, keys.batch_size)
        objective, prior = objective_of(networks.objective), cast(NoiseToCode, prior_of(config)).to(generator.device)
        self.config = config.model_copy(update={"networks": networks})
        self.player, self.game = player, Game(self.config, objective, prior, generator)
        self.keys, self.judges = keys.adversary, keys.adversary.judges

    @classmethod
    def resumed(
        cls, config: Config, generator: Engine, batch: int, device: torch.device, state: State | None
    ) -> Adversary:
        """As it was saved, or new, with random weights."""
        keys = config.autoencoder
        optimizer = OptimizerConfig(keys.adversary.critic.lr, keys.betas, clip=keys.adversary.critic.clip)
        # its network is also called outside of DeepSpeed, which ZeRO 3 would have taken apart
        settings = config.engine.model_copy(update={"zero": min(config.engine.zero, 2)})
        engine = build_engine(adversary_of(config), optimizer, settings, batch, device, state)
        return cls(config, Player.resumed(engine, state), generator)

    def lazy_state(self) -> State:
        return self.player.saved(self.player.engine.lazy_state())

    def state(self) -> State:
        return self.player.saved(self.player.engine.state())

    def round(self, turn: Turn, batch: Rows) -> Round:
        """The batch as the steps of critics see it."""
        label_B = torch.full_like(batch.rows_B, -1)
        return Round(self.game, turn.epoch, batch.rows_B, batch.real_BCHW, label_B, batch.weight_B, turn.scale)

    @property
    def critic(self) -> Critic:
        return cast(Critic, self.player.engine.network)

    def fresh_codes(self, epoch: int, rows_B: Tensor) -> Tensor:
        """Codes z_BD of the prior, a function of (seed, epoch, row)."""
        prior = self.game.prior
        e_BE = noise(self.config.seed, epoch, rows_B, prior.noise_dim, rows_B.device, Stream.PRIOR)
        with torch.no_grad():
            return prior(e_BE)

    def judged_codes(self, now: Round, code_BD: Tensor) -> Tensor:
        """Codes of the images that are judged: of the encoder or the prior, each as likely, by (seed, epoch, row)."""
        e_B1 = noise(self.config.seed, now.epoch, now.rows_B, 1, now.rows_B.device, Stream.PAIRED)
        return torch.where(e_B1 < 0, code_BD, self.fresh_codes(now.epoch, now.rows_B))

    def judge(self, now: Round, code_BD: Tensor) -> tuple[CriticStep, Tensor]:
        """Update the critic.

        Args:
            now: the batch, with its images. code_BD: codes of the encoder.
        Returns:
            The step, and the other codes of it: of the images that were judged, or of the prior.
        """
        if self.judges == "codes":
            fresh_BD = self.fresh_codes(now.epoch, now.rows_B)
            of_prior = replace(now, real_BCHW=as_images(fresh_BD))
            return of_prior.judge(self.player, as_images(code_BD), torch.zeros(0), code_BD), fresh_BD
        judged_BD = self.judged_codes(now, code_BD)
        fake_BCHW = self.game.generator.draw(judged_BD, now.weight_B)
        return now.judge(self.player, fake_BCHW, torch.zeros(0), judged_BD), judged_BD

    def of_images(self, fake_RCHW: Tensor, now: Round, reconstruction: ReconstructionLoss) -> tuple[Tensor, Tensor]:
        """G's loss [R] of the images of codes of the encoder, and of those that are judged.

        Rows of the first half have the loss of reconstruction, those of the second the critic's objective; twice each,
        so that the mean over all is the sum of both means.

        Returns:
            The loss, and the distance [B] of images and reconstructions in the critic's features, if it is asked for.
        """
        rebuilt_BCHW, judged_BCHW = fake_RCHW.chunk(2)
        rebuilt_B, local, weight_B = reconstruction(rebuilt_BCHW), self.player.engine.local, now.weight_B
        fake_B = local(judged_BCHW, weight_B).score_B.float()
        real_B, apart_B = fake_B.detach(), torch.zeros_like(weight_B)
        if self.game.objective.needs_real or self.keys.features:
            with torch.no_grad():
                real = local(now.real_BCHW, weight_B)
            real_B = real.score_B.float()
        if self.keys.features:
            rebuilt_BF = local(rebuilt_BCHW, weight_B).features_BF.float()
            apart_B = 0.5 * (rebuilt_BF - real.features_BF.float()).square().sum(1)
            rebuilt_B = rebuilt_B + self.keys.features * apart_B
        against_B = self.keys.weight * self.game.objective.generator(Scores(real_B, fake_B))
        return 2 * torch.cat([rebuilt_B, against_B]), apart_B

    def of_codes(self, code_BD: Tensor, fresh_BD: Tensor, weight_B: Tensor) -> Tensor:
        """The encoder's loss [B] of its codes; `fresh_BD` are of the prior."""
        local = self.player.engine.local
        fake_B = local(as_images(code_BD), weight_B).score_B.float()
        real_B = fake_B.detach()
        if self.game.objective.needs_real:
            with torch.no_grad():
                real_B = local(as_images(fresh_BD), weight_B).score_B.float()
        return self.keys.weight * self.game.objective.generator(Scores(real_B, fake_B))


def as_images(code_BD: Tensor) -> Tensor:
    """Codes as images of 1 px, which critics take: [B, D, 1, 1]."""
    return code_BD[:, :, None, None]
