"""Stage 1 of an autoencoder: training of an encoder and the generator behind it, by reconstruction.

With `autoencoder.kl` the encoder gives a distribution of codes (VAE: Kingma & Welling 2014), else a point. A critic may
judge its images or its codes (`adversary.py`). The codes of
the latent table are the means that the encoder gives: of each row at its last visit while training, and of all rows at
once whenever they are used. So all that samples, measures and draws has them as it has the codes of GLO.

Shapes: B rows of this worker's batch, D latent dimension, O outputs of the encoder, K numbers of a piggyback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from ..config.run import Config
from ..models.encoders import Posterior, encoder_of
from ..models.generators import generator_of
from .adversary import Adversary, Rows
from .engine.build import build_engine
from .engine.optimizer import OptimizerConfig
from .engine.step import StepResult
from .glo import GENERATOR
from .objective import Objective
from .passes import Played, Turn, rows_in_order, train_passes
from .plan.costs import encoder_cost, model_flops, step_flops
from .previews import Pictures, Previews
from .rounds import watching
from .stage import ENCODER, Stage, StageContext, StageCost, StageInfo, StageStep, State

ADVERSARY = "adversary"  # network name
OF_IMAGES = 2  # sums that the generator's step carries: of the reconstruction loss, and of the critic's distance


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
        self.adversary: Adversary | None = None
        if config.autoencoder.adversary.judges != "none":
            torch.manual_seed(config.seed + 3)
            self.adversary = Adversary.resumed(config, self.generator, batch, device, networks.get(ADVERSARY))
        self.loss = Objective(config, device)
        self.drawing = Previews(config, context.images, context.latents.rows, device)
        self.encoded = False  # whether the table has the codes of the encoder as it is now

    @classmethod
    def info(cls, config: Config) -> StageInfo:
        keys, title = config.autoencoder, "VAE" if config.autoencoder.kl else "Autoencoder"
        judged = {"none": title, "images": f"{title}-GAN", "codes": f"Adversarial {title.lower()}"}
        return StageInfo("autoencoder", judged[keys.adversary.judges], keys.epochs)

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
        """Update the critic, where there is one, the generator by the codes of a batch, and the encoder.

        The gradient of the whole loss to the encoder's outputs is that of G's loss to the codes, which the generator's
        step returns, times that of the codes to the outputs, and that of what is asked of the codes themselves.
        """
        config, rows, adversary = (
            self.context.config,
            Rows.of(self.context.config, turn, self.context.device),
            self.adversary,
        )
        before = Posterior.of(self.encoder.draw(rows.real_BCHW, rows.weight_B), config.generator.latent_dim)
        code_BD = before.draw(rows.e_BD)
        judged, other_BD = None, None
        if adversary is not None:
            judged, other_BD = adversary.judge(adversary.round(turn, rows), code_BD)

        made, grad_BD = self.generator_step(turn, rows, code_BD, other_BD, piggyback_K)
        pulled = self.encoder_step(turn, rows, grad_BD, other_BD, hold=not made.applied)

        carried_K = made.piggyback_K[OF_IMAGES:]
        if made.loss is None:
            return Played(None, True, carried_K)
        if made.applied:
            real_B = turn.batch.weight_B > 0
            self.context.latents.replace(
                turn.batch.rows_B[real_B].numpy(), before.mean_BD[real_B.to(before.mean_BD.device)]
            )
        self.encoded = False
        count, kl, fooling = pulled.piggyback_K.tolist()
        rebuilt, apart = (made.piggyback_K[:OF_IMAGES] / count).tolist()
        facts = {"reconstruction": rebuilt}
        if config.autoencoder.kl:
            facts["kl"] = kl / count
        if config.autoencoder.adversary.features:
            facts["features"] = apart
        applied = pulled.applied and (judged is None or judged.applied)
        loss = made.loss + (config.autoencoder.kl * kl + fooling) / count
        return Played(loss, applied, carried_K, facts if judged is None else facts | judged.facts)

    def generator_step(
        self, turn: Turn, rows: Rows, code_BD: Tensor, other_BD: Tensor | None, piggyback_K: Tensor
    ) -> tuple[StepResult, Tensor]:
        """Update the generator; returns also the gradient [B, D] of the loss of reconstruction to the codes.

        Before the piggyback come the sums of the reconstruction loss and of the critic's distance.
        """
        keys, adversary, device = self.context.config.autoencoder, self.adversary, self.context.device
        sent_K = torch.cat([torch.zeros(OF_IMAGES), piggyback_K]).to(device)

        def rebuilt(fake_BCHW: Tensor, part: slice = slice(None)) -> Tensor:
            loss_B: Tensor = self.loss(fake_BCHW, rows.real_BCHW[part], rows.seed_B[part])
            sent_K[0] += torch.where(rows.weight_B[part] > 0, loss_B.detach(), 0.0).sum()
            return keys.reconstruction * loss_B

        if adversary is None or adversary.judges == "codes":
            launched = self.generator.launch(code_BD, rows.weight_B, rebuilt, keys.lr * turn.scale, sent_K)
            return launched.fetch()(), launched.grad_BD

        now = adversary.round(turn, rows)

        def loss_of(fake_RCHW: Tensor, part: slice) -> Tensor:
            loss_R, apart_B = adversary.of_images(fake_RCHW, now, rebuilt)
            sent_K[1] += torch.where(rows.weight_B > 0, apart_B.detach(), 0.0).sum()
            return loss_R

        code_RD, weight_R = torch.cat([code_BD, cast(Tensor, other_BD)]), rows.weight_B.repeat(2)
        with watching([adversary.critic]):
            launched = self.generator.launch(code_RD, weight_R, loss_of, keys.lr * turn.scale, sent_K)
        return launched.fetch()(), launched.grad_BD[: len(code_BD)] / 2

    def encoder_step(self, turn: Turn, rows: Rows, grad_BD: Tensor, other_BD: Tensor | None, hold: bool) -> StepResult:
        """Update the encoder; carries the sums of the rows, of their divergence, and of what fools the critic."""
        config, adversary = self.context.config, self.adversary
        keys, dim = config.autoencoder, config.generator.latent_dim
        measured = torch.zeros(3, device=self.context.device)  # set with the loss, and summed with it

        def loss_of(out_BO: Tensor, part: slice) -> Tensor:
            posterior, real_B = Posterior.of(out_BO, dim), rows.weight_B[part] > 0
            code_BD, kl_B = posterior.draw(rows.e_BD[part]), posterior.divergence()
            fooling_B = torch.zeros_like(kl_B)
            if adversary is not None and adversary.judges == "codes":
                fooling_B = adversary.of_codes(code_BD, cast(Tensor, other_BD)[part], rows.weight_B[part])
            sums_B3 = torch.stack([torch.ones_like(kl_B), kl_B.detach(), fooling_B.detach()], 1)
            measured.add_(torch.where(real_B[:, None], sums_B3, 0.0).sum(0))
            return (code_BD * grad_BD[part]).sum(1) + keys.kl * kl_B + fooling_B

        with watching([] if adversary is None else [adversary.critic]):
            return self.encoder.step(rows.real_BCHW, rows.weight_B, loss_of, keys.lr * turn.scale, measured, hold=hold)

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
        states = {GENERATOR: self.generator.lazy_state(), ENCODER: self.encoder.lazy_state()}
        return states | ({} if self.adversary is None else {ADVERSARY: self.adversary.lazy_state()})

    def state(self) -> dict[str, State]:
        self.encode()
        states = {GENERATOR: self.generator.state(), ENCODER: self.encoder.state()}
        return states | ({} if self.adversary is None else {ADVERSARY: self.adversary.state()})

    def previews(self) -> Pictures:
        self.encode()
        return self.drawing.reconstructed(self.generator.weights(), self.context.latents)

    def image_flops(self) -> int:
        return model_flops(self.context.config)


STAGE = Autoencoder
