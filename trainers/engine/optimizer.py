"""The optimiser of an engine: Adam or RMSProp, of whole parameters or of the parts that ZeRO cuts them into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

UNCORRECTED = 1 << 20  # updates after which Adam's correction for its first ones is 1; still counted in float32


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser of one network: learning rate, betas, and the decay of the moving average of the weights (0 is off).

    lr: at construction; every step sets its own. clip: bound of every weight after an update (0 is off). kind: rmsprop
    has the decay betas[1] and no momentum. history: weight in the loss of the squared distance of the weights to their
    mean over all updates (0 is off).
    """

    lr: float
    betas: tuple[float, float]
    ema: float = 0.0
    clip: float = 0.0
    kind: Literal["adam", "rmsprop"] = "adam"
    history: float = 0.0


class GuardedAdam(torch.optim.Adam):
    """Adam that skips an update if `withheld` is 1, also inside a wrapper (DeepSpeed calls `step` itself).

    The fused optimiser reads it on the device, as it does the overflow flag of a gradient scaler.

    What is done to single weights is done here and not by their owner, so that ZeRO does it to the parts it updates:

    - clip (Arjovsky et al. 2017, Algorithm 1).
    - historical averaging: the gradient of history |w - mean w|^2, with the mean as a constant (Salimans et al. 2016,
      Sec. 3.3); gradient clipping does not see it.
    - RMSProp, which is Adam without momentum and without the correction of its first updates: their count starts late.

    moments: the tensors that are kept for every parameter.
    """

    withheld: Tensor | None = None

    def __init__(self, parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig, fused: bool) -> None:
        betas = (0.0, config.betas[1]) if config.kind == "rmsprop" else config.betas
        super().__init__(parameters, lr=config.lr, betas=betas, fused=fused)
        self.clip, self.history = config.clip, config.history
        self.before = UNCORRECTED if config.kind == "rmsprop" else 0
        self.moments = ("exp_avg", "exp_avg_sq", *(("history",) if config.history else ()))

    @property
    def updates(self) -> float:
        """Updates so far."""
        return max(float(slot["step"]) for slot in self.state.values()) - self.before

    def prime(self, parameters: Iterable[Tensor], updates: float) -> None:
        """Create the state before the first step, so that it can always be saved and restored."""
        for parameter in parameters:
            on = parameter.device if self.defaults["fused"] else torch.device("cpu")
            step = torch.tensor(updates + self.before, dtype=torch.float32, device=on)
            self.state[parameter] = {"step": step} | {key: torch.zeros_like(parameter) for key in self.moments}

    def step(self, closure: Any = None) -> Any:
        if self.defaults["fused"]:
            self.found_inf = self.withheld
        elif self.withheld is not None and self.withheld:
            return None
        if self.history:
            self._pull_to_mean()
        done = super().step(closure)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"] if self.clip):
            bounded = parameter.data.clamp(-self.clip, self.clip)
            parameter.data.copy_(
                bounded if self.withheld is None else bounded.where(self.withheld == 0, parameter.data)
            )
        return done

    @torch.no_grad()
    def _pull_to_mean(self) -> None:
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                mean = self.state[parameter]["history"]
                share = 1 / (self.state[parameter]["step"] - self.before + 1)
                mean.lerp_(parameter, share if self.withheld is None else share * (self.withheld == 0))
                parameter.grad.add_(parameter - mean, alpha=2 * self.history)
