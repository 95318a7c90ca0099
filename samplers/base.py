"""The interface of samplers: a function of normal noise to latent codes, fitted to the codes of stage 1.

A kind has a section in config/samplers.py and a module of its name here, which defines `SAMPLER = <its class>`.

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
    """The codes of stage 1 on one worker: z_nD of its own rows, out of `total` rows."""

    z_nD: Tensor
    rows: range
    total: int


@dataclass(frozen=True)
class FitStep:
    """The result of one step of a fit, on this worker.

    steps: steps per epoch. applied: False if a gradient was not finite and the step was skipped. piggyback_K: sum of
    the workers' piggybacks. epoch_facts: metrics of the epoch, `loss` among them, if it ends with this step; only
    then can the fit be resumed from `state`.
    """

    epoch: int
    step: int
    steps: int
    piggyback_K: Tensor
    applied: bool = True
    epoch_facts: dict[str, float] | None = field(default=None)


class Sampler(ABC):
    """A sampler during its fit; replicated, and identical on all workers.

    Args:
        config: section of its kind.
        latent_dim: D.
        constraint: whether codes lie on the unit sphere or in the unit ball.
        seed: seed of the run.
        state: a result of `state` to resume from.
    """

    title: ClassVar[str]  # for display
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
        self.epochs = getattr(config, "epochs", self.epochs)
        self.network = self.build(config, latent_dim, constraint).to(device)
        if state is not None:
            self.network.load_state_dict(state["weights"])
        self.setup(state)

    def setup(self, state: State | None) -> None:  # noqa: B027
        """Make what a kind needs beside its network, such as an optimiser, new or as in `state`."""

    @staticmethod
    @abstractmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> NoiseToCode:
        """Build the function, unfitted."""

    @abstractmethod
    def fit(
        self,
        codes: Codes,
        first_epoch: int,
        piggyback: Callable[[], Tensor],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Iterator[FitStep]:
        """Fit to the codes from `first_epoch` on; yields after every step.

        All workers take the same steps. The caller may stop after any step; on resume the epoch starts again.

        Args:
            piggyback: called once per step for a tensor [K], float32, which is summed over workers in the step's
                all-reduce.
            enter: called with the name of each phase when it begins.
        Raises:
            UserError: the fit diverged.
        """

    def codes(self, e_BE: Tensor) -> Tensor:
        """Codes z_BD of normal noise, without a graph."""
        with torch.inference_mode():
            return self.network.eval()(e_BE)

    def state(self) -> State:
        """The state to resume from at the end of an epoch, on the CPU."""
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}
        return {"weights": weights, "updates": 0.0}

    @classmethod
    def flops(cls, config: SamplerConfig, latent_dim: int, rows: int) -> float:
        """FLOPs of the whole fit to `rows` rows."""
        return 0.0

    @classmethod
    def steps(cls, config: SamplerConfig, rows: int) -> int:
        """Steps of the whole fit to `rows` rows."""
        return 1


def sampler_class(kind: str) -> type[Sampler]:
    """The class of a kind of sampler.

    Raises:
        KeyError: the configuration has no such kind.
    """
    SAMPLERS[kind]  # import only modules of known kinds
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
    """Build the sampler of a configuration, new or resumed from `state`."""
    kind = sampler_class(config.kind)
    return kind(config, latent_dim, constraint, seed=seed, device=device, state=cast("State | None", state))


def build_network(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> NoiseToCode:
    """Build the function of a sampler, into which a packaged model's weights are loaded."""
    return sampler_class(config.kind).build(config, latent_dim, constraint)
