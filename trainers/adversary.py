"""A critic in the training of an autoencoder: of its images (VAE-GAN) or of its codes (adversarial autoencoder).

Of images (Larsen et al. 2016): the critic learns to score images above reconstructions and above images of fresh codes.
G is trained against it by both, and to reconstruct in the critic's features, which the encoder follows. The encoder has
no part in the critic's objective, as published: G makes each reconstruction a second time, of a code that gets none of
the gradient. Of codes (Makhzani et al. 2016): the critic learns to score codes of the prior above those of the encoder,
which is trained against it.

Shapes: B rows of this worker's batch, R = 3 B codes for G, D latent dimension, C, H, W channels, height, width, F
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

    def judge(self, now: Round, code_BD: Tensor) -> tuple[CriticStep, Tensor]:
        """Update the critic by the codes of the encoder; returns also what it was shown: codes of the prior.

        Args:
            now: the batch, with its images.
        """
        fresh_BD = self.fresh_codes(now.epoch, now.rows_B)
        if self.judges == "codes":
            of_prior = replace(now, real_BCHW=as_images(fresh_BD))
            return of_prior.judge(self.player, as_images(code_BD), torch.zeros(0), code_BD), fresh_BD
        twice_RD, weight_R = torch.cat([code_BD, fresh_BD]), now.weight_B.repeat(2)
        fake_RCHW = self.game.generator.draw(twice_RD, weight_R)
        doubled = replace(
            now,
            rows_B=now.rows_B.repeat(2),
            real_BCHW=now.real_BCHW.repeat(2, 1, 1, 1),
            label_B=now.label_B.repeat(2),
            weight_B=weight_R,
        )
        return doubled.judge(self.player, fake_RCHW, torch.zeros(0), twice_RD), fresh_BD

    def of_images(self, fake_RCHW: Tensor, now: Round, reconstruction: ReconstructionLoss) -> tuple[Tensor, Tensor]:
        """G's loss [R] of images of codes of the encoder, the same again, and codes of the prior.

        Rows of the first third have the loss of reconstruction, those of the others the critic's objective, so scaled
        that the mean over all is that of the first, and `weight` times that of the others, per image of the batch.

        Returns:
            The loss, and the distance [B] of images and reconstructions in the critic's features, if it is asked for.
        """
        size, weight_B = len(now.rows_B), now.weight_B
        rebuilt_BCHW, judged_RCHW = fake_RCHW[:size], fake_RCHW[size:]
        rebuilt_B = reconstruction(rebuilt_BCHW)
        scored = self.player.engine.local(judged_RCHW, weight_B.repeat(2))
        real_R, apart_B = scored.score_B.detach().float(), weight_B.new_zeros(size)
        if self.game.objective.needs_real or self.keys.features:
            with torch.no_grad():
                real = self.player.engine.local(now.real_BCHW, weight_B)
            real_R = real.score_B.float().repeat(2)
        if self.keys.features:
            rebuilt = self.player.engine.local(rebuilt_BCHW, weight_B)
            apart_B = 0.5 * (rebuilt.features_BF.float() - real.features_BF.float()).square().sum(1)
            rebuilt_B = rebuilt_B + self.keys.features * apart_B
        against_R = self.keys.weight * self.game.objective.generator(Scores(real_R, scored.score_B.float()))
        return torch.cat([3 * rebuilt_B, 1.5 * against_R]), apart_B

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
