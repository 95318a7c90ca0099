"""What every kind of sampler is: a function of normal noise to latent codes, fitted to the codes of a stage 1.

A kind is a section of config/samplers.py and a file of its name here, which ends in `SAMPLER = <its class>`.

Shapes: B batch, D latent dimension, E noise dimension, n rows of this worker, N rows of all workers, K numbers of a
piggyback.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..config.samplers import SAMPLERS, SamplerConfig
from ..models.mapping import NoiseToCode
from ..models.sphere import Constraint

State = dict[str, Any]  # groups of tensors by name (`weights`, Adam's moments), and `updates`


@dataclass(frozen=True)
class Codes:
    """The codes of a stage 1 as a worker has them: those of its own rows, z_nD, of `total` rows in all."""

    z_nD: Tensor
    rows: range
    total: int


@dataclass(frozen=True)
class FitStep:
    """What one step of a fit did, on this worker.

    steps: of an epoch. applied: False if a gradient was not finite, so that nothing moved. piggyback_K: sum over
    workers of what they added to the step. epoch_facts: numbers of the whole epoch, `loss` among them, where it ends
    with this step; only then can the fit be resumed from `state`.
    """

    epoch: int
    step: int
    steps: int
    piggyback_K: Tensor
    applied: bool = True
    epoch_facts: dict[str, float] | None = field(default=None)


class Sampler(ABC):
    """A sampler while it is fitted; replicated on every worker and equal on all of them.

    Args:
        config: the section of its kind.
        latent_dim: D.
        constraint: where codes lie: on the unit sphere, or in the unit ball.
        seed: of the run.
        state: what `state` returned, to resume from.
    """

    title: ClassVar[str]  # for people
    epochs: int = 1

    def __init__(
        self,
        config: SamplerConfig,
        latent_dim: int,
        constraint: Constraint,
        *,
        seed: int,
        device: torch.device,
        state: State | None = None,
    ) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.network = self.build(config, latent_dim, constraint).to(device)
        if state is not None:
            self.network.load_state_dict(state["weights"])

    @staticmethod
    @abstractmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> NoiseToCode:
        """The function before it is fitted."""

    @abstractmethod
    def fit(
        self,
        codes: Codes,
        first_epoch: int,
        piggyback: Callable[[], Tensor],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Iterator[FitStep]:
        """Fit to the codes from `first_epoch` on; yields after every step.

        All workers take the same steps. The caller may stop at any of them: the epoch is repeated from its beginning.

        Args:
            piggyback: called once a step for numbers [K], float32, whose sum over workers comes back with it.
            enter: called with the name of each phase of the work when it begins.
        Raises:
            UserError: the fit diverged.
        """

    def codes(self, e_BE: Tensor) -> Tensor:
        """Codes z_BD of normal noise, without a graph."""
        with torch.inference_mode():
            return self.network.eval()(e_BE)

    def state(self) -> State:
        """All that is needed to resume at the end of an epoch, on the CPU."""
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}
        return {"weights": weights, "updates": 0.0}

    @classmethod
    def flops(cls, config: SamplerConfig, latent_dim: int, rows: int) -> float:
        """Operations of the whole fit to so many rows."""
        return 0.0

    @classmethod
    def steps(cls, config: SamplerConfig, rows: int) -> int:
        """Steps of the whole fit to so many rows."""
        return 1


def sampler_class(kind: str) -> type[Sampler]:
    """The class of a kind that the configuration knows.

    Raises:
        KeyError: it knows no such kind.
    """
    SAMPLERS[kind]  # nothing else is imported
    return cast(type[Sampler], import_module(f"{__package__}.{kind.replace('-', '_')}").SAMPLER)


def build_sampler(
    config: SamplerConfig,
    latent_dim: int,
    constraint: Constraint,
    *,
    seed: int,
    device: torch.device,
    state: Mapping[str, Any] | None = None,
) -> Sampler:
    """The sampler of a configuration, fresh or resumed."""
    kind = sampler_class(config.kind)
    return kind(config, latent_dim, constraint, seed=seed, device=device, state=cast("State | None", state))


def build_network(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> NoiseToCode:
    """The function of a sampler, to be given the weights of a packaged model."""
    return sampler_class(config.kind).build(config, latent_dim, constraint)
