"""Stage 2: fit a sampler of any kind to the codes of stage 1. The generator does not change.

Shapes: n rows of this worker, D latent dimension, K numbers of a piggyback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from time import monotonic

import torch
from torch import Tensor

from ..config.run import Config
from ..samplers.base import Codes, build_sampler, sampler_class
from .glo import GENERATOR
from .previews import Pictures, Previews
from .stage import Stage, StageContext, StageCost, StageInfo, StageStep, State, final_weights

MAPPING = "mapping"  # network name, for every kind of sampler
TABLE_POLL_S = 5.0  # the fit uses a copy of the codes, so the death of their actor must be polled for


class SamplerStage(Stage):
    """Training of the configured sampler, replicated on all workers."""

    def __init__(self, context: StageContext, networks: Mapping[str, State]) -> None:
        config = context.config
        self.context, self.preview_every = context, 2 * config.preview.every_epochs
        torch.manual_seed(config.seed + 1)
        self.resumable: State | None = networks.get(MAPPING)
        self.generator = networks.get(GENERATOR)
        self.sampler = build_sampler(
            config.sampler,
            config.generator.latent_dim,
            config.constraint,
            seed=config.seed,
            device=context.device,
            state=self.resumable,
        )
        self.drawing = Previews(config, context.images, context.latents.rows, context.device)
        self.polled_at = monotonic()

    @classmethod
    def info(cls, config: Config) -> StageInfo:
        kind = sampler_class(config.sampler.kind)
        return StageInfo(config.sampler.kind, kind.title, getattr(config.sampler, "epochs", kind.epochs))

    @classmethod
    def cost(cls, config: Config, rows: int) -> StageCost:
        kind = sampler_class(config.sampler.kind)
        flops = kind.flops(config.sampler, config.generator.latent_dim, rows)
        return StageCost(kind.steps(config.sampler, rows), flops)

    def steps(self, epoch: int, step: int, piggyback: Callable[[], Tensor]) -> Iterator[StageStep]:
        """An epoch is resumed from its beginning, so `step` is always 0."""
        latents = self.context.latents
        codes = Codes(latents.codes(), latents.rows, len(self.context.images))
        for done in self.sampler.fit(codes, epoch, piggyback, self.context.enter):
            self.poll_table()
            ends = done.epoch_facts is not None
            if ends:
                self.resumable = self.sampler.state()
            yield StageStep(
                done.epoch,
                done.step,
                done.steps,
                done.piggyback_K,
                applied=done.applied,
                facts=done.epoch_facts or {},
                resumable=ends,
                ends_epoch=ends,
            )

    def poll_table(self) -> None:
        """Raise if the actor that holds this worker's codes has died."""
        if monotonic() - self.polled_at > TABLE_POLL_S:
            self.context.latents.gather(())
            self.polled_at = monotonic()

    def lazy_state(self) -> dict[str, State]:
        return {} if self.resumable is None else {MAPPING: self.resumable}

    def state(self) -> dict[str, State]:
        return self.lazy_state()

    def previews(self) -> Pictures:
        if self.resumable is None or self.generator is None:
            return {}
        return self.drawing.sampled(final_weights(self.generator), self.resumable["weights"])


STAGE = SamplerStage
