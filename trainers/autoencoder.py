"""Stage 1 of an autoencoder: training of an encoder and the generator behind it, by reconstruction.

With `autoencoder.kl` the encoder gives a distribution of codes (VAE: Kingma & Welling 2014), else a point. The codes of
the latent table are the means that the encoder gives: of each row at its last visit while training, and of all rows at
once whenever they are used. So all that samples, measures and draws has them as it has the codes of GLO.

Shapes: B rows of this worker's batch, D latent dimension, O outputs of the encoder, K numbers of a piggyback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..config.run import Config
from ..models.encoders import Posterior, encoder_of
from ..models.generators import generator_of
from ..models.noise import Stream, noise
from ..models.patches import patch_seeds
from .engine.build import build_engine
from .engine.optimizer import OptimizerConfig
from .glo import GENERATOR
from .objective import Objective
from .passes import Played, Turn, rows_in_order, train_passes
from .plan.costs import encoder_cost, model_flops, step_flops
from .previews import Pictures, Previews
from .stage import Stage, StageContext, StageCost, StageInfo, StageStep, State

ENCODER = "encoder"  # network name


class Autoencoder(Stage):
    """An encoder and a generator on one worker, each with an engine of its own."""

    def __init__(self, context: StageContext, networks: Mapping[str, State]) -> None:
        config = context.config
        self.context, self.preview_every = context, config.preview.every_epochs
        optimizer = OptimizerConfig(config.autoencoder.lr, config.autoencoder.betas)
        engine, batch, device = config.engine, config.batch_size, context.device
        torch.manual_seed(config.seed)
        self.generator = build_engine(generator_of(config), optimizer, engine, batch, device, networks.get(GENERATOR))
        torch.manual_seed(config.seed + 2)
        self.encoder = build_engine(encoder_of(config), optimizer, engine, batch, device, networks.get(ENCODER))
        self.loss = Objective(config, device)
        self.drawing = Previews(config, context.images, context.latents.rows, device)
        self.encoded = False  # whether the table has the codes of the encoder as it is now

    @classmethod
    def info(cls, config: Config) -> StageInfo:
        return StageInfo("autoencoder", "VAE" if config.autoencoder.kl else "Autoencoder", config.autoencoder.epochs)

    @classmethod
    def cost(cls, config: Config, rows: int) -> StageCost:
        keys = config.autoencoder
        encoding = encoder_cost(config).forward_flops * rows  # of all codes, at the end
        steps = keys.epochs * math.ceil(rows / keys.batch_size)
        return StageCost(steps, float(step_flops(config)) * rows * keys.epochs + encoding)

    def steps(self, epoch: int, step: int, piggyback: Callable[[], Tensor]) -> Iterator[StageStep]:
        config, images = self.context.config, self.context.images
        self.context.enter("autoencoder")
        yield from train_passes(
            config, config.autoencoder, images, self.play, (epoch, step), piggyback, "autoencoder.lr"
        )

    def play(self, turn: Turn, piggyback_K: Tensor) -> Played:
        """Update the generator by the codes of a batch, and the encoder by the gradient of these codes.

        The gradient of the whole loss to the encoder's outputs is that of G's loss to the codes, which the generator's
        step returns, times that of the codes to the outputs, and that of the divergence.
        """
        config, batch, device = self.context.config, turn.batch, self.context.device
        keys, dim = config.autoencoder, config.generator.latent_dim
        img_BCHW = batch.img_BCHW.to(device, non_blocking=True).float() / 255
        weight_B = batch.weight_B.to(device, non_blocking=True)
        seed_B = patch_seeds(config.seed, turn.epoch, batch.rows_B)
        e_BD = noise(config.seed, turn.epoch, batch.rows_B.to(device), dim, device, Stream.POSTERIOR)

        before = Posterior.of(self.encoder.draw(img_BCHW, weight_B), dim)
        launched = self.generator.launch(
            before.draw(e_BD),
            weight_B,
            lambda fake_BCHW, part: self.loss(fake_BCHW, img_BCHW[part], seed_B[part]),
            keys.lr * turn.scale,
            piggyback_K,
        )

        made = launched.fetch()()
        measured = torch.zeros(2, device=device)  # rows and their divergence: set with the loss, and summed with it

        def loss_of(out_BO: Tensor, part: slice) -> Tensor:
            posterior, real_B = Posterior.of(out_BO, dim), weight_B[part] > 0
            kl_B = posterior.divergence()
            measured.add_(torch.stack([real_B.sum(), torch.where(real_B, kl_B.detach(), 0.0).sum()]))
            return (posterior.draw(e_BD[part]) * launched.grad_BD[part]).sum(1) + keys.kl * kl_B

        held = not made.applied
        pulled = self.encoder.step(img_BCHW, weight_B, loss_of, keys.lr * turn.scale, measured, hold=held)
        if made.loss is None:
            return Played(None, True, made.piggyback_K)
        if made.applied:
            real_B = batch.weight_B > 0
            self.context.latents.replace(batch.rows_B[real_B].numpy(), before.mean_BD[real_B.to(device)])
        self.encoded = False
        rows, kl = pulled.piggyback_K.tolist()
        facts = {"reconstruction": made.loss, "kl": kl / rows} if keys.kl else {}
        return Played(made.loss + keys.kl * kl / rows, pulled.applied, made.piggyback_K, facts)

    def encode(self) -> None:
        """Write the codes of this worker's rows into the table; those of unreadable images stay. Collective."""
        if self.encoded:
            return
        context, config = self.context, self.context.config
        context.enter("encoding")
        encoder = encoder_of(config)
        encoder.load_state_dict(self.encoder.weights())  # every worker holds a part
        encoder.to(context.device).eval()
        for batch in rows_in_order(config, context.images, context.latents.rows):
            with torch.inference_mode():
                out_BO = encoder(batch.img_BCHW.to(context.device).float() / 255)
            real_B = batch.weight_B > 0
            mean_BD = Posterior.of(out_BO, config.generator.latent_dim).mean_BD[real_B.to(context.device)]
            context.latents.replace(batch.rows_B[real_B].numpy(), mean_BD)
        context.latents.flush()
        self.encoded = True

    def lazy_state(self) -> dict[str, State]:
        return {GENERATOR: self.generator.lazy_state(), ENCODER: self.encoder.lazy_state()}

    def state(self) -> dict[str, State]:
        self.encode()
        return {GENERATOR: self.generator.state(), ENCODER: self.encoder.state()}

    def previews(self) -> Pictures:
        self.encode()
        return self.drawing.reconstructed(self.generator.weights(), self.context.latents)

    def image_flops(self) -> int:
        return model_flops(self.context.config)


STAGE = Autoencoder
