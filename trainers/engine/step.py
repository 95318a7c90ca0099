"""One optimiser step of a network in plain PyTorch: the reference, and the base class of the DeepSpeed engine.

Engines keep fp32 weights and run the network under autocast when `precision` is bf16; with DeepSpeed on or off
the numbers are the same (compared in a test).

Shapes: B rows of this worker's batch, D input dimension, K piggyback numbers, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...cluster.checkpoints.pieces import LazyTensor
from ...cluster.row_optimizers import gradient_fault
from ...config.sections import EngineConfig
from ...models.comm import all_sum, world_size
from ...models.norm import frozen_statistics, pending_statistics
from .optimizer import GuardedAdam, OptimizerConfig
from .transfer import Download, Upload


@dataclass(frozen=True)
class StepResult:
    """Result of one global step, on the CPU.

    loss: mean over the real rows of all workers; None if there is none.  grad_BD: gradient of each row's own loss with
    respect to its input, without any averaging.  applied: False if there was no real row, or if the loss, a gradient or
    a batch's statistics were not finite; then nothing of the network or its optimiser changed.  piggyback_K: sum over
    workers of the `piggyback_K` they passed in, float32; empty without one.
    """

    loss: float | None
    grad_BD: Tensor
    applied: bool
    piggyback_K: Tensor


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose work is queued on the device; the host has waited for none of it.

    grad_BD: as in `StepResult`, on the device.  numbers: sum of the losses, 1 if the step is withheld, number of real
    rows, and the piggyback, summed over workers; on the device.
    """

    grad_BD: Tensor
    numbers: Tensor

    def fetch(self, grad_BD: Tensor | None = None) -> Callable[[], StepResult]:
        """Queue the one copy to the CPU; the callable waits for it.

        Args:
            grad_BD: what to return as the gradient, on the device; None is the step's own.
        """
        copies = Download(self.numbers, self.grad_BD if grad_BD is None else grad_BD)

        def result() -> StepResult:
            numbers, own_BD = copies.wait()
            loss_sum, withheld, real_rows = numbers[:3].tolist()
            return StepResult(loss_sum / real_rows if real_rows else None, own_BD, not withheld, numbers[3:])

        return result


class Precision(nn.Module):
    """Wrapper that runs a network under autocast; it is inside because DeepSpeed disables an outer autocast."""

    def __init__(self, network: nn.Module, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.network, self.device, self.bf16 = network, device, bf16

    def forward(self, z_BD: Tensor, weight_B: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(z_BD, weight_B)


class Engine:
    """Plain PyTorch, one process: the reference, and the base of `DeepSpeedEngine`.

    A process may hold several engines, one per network. A loss that goes through the network of another engine calls
    its `local`, not its `forward`, and switches its parameters off meanwhile (`requires_grad_`): its next update would
    else contain the gradients of this loss.

    Args:
        network: called as network(z_BD, weight_B); moved to `device` and put in training mode.
        batch: rows of a global batch, over all workers.
        state: what `state()` returned, to resume from; its tensors are copied.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        batch: int,
        device: torch.device,
        state: Mapping | None = None,
    ) -> None:
        self.network = network.to(device).train()
        self.device, self.upload = device, Upload(device)
        self.world = world_size()
        self.accumulation = config.accumulation
        self.clip_norm = config.clip_norm
        if state is not None:
            network.load_state_dict(state["weights"])
        self.names = [name for name, _ in network.named_parameters()]
        self.ema = None
        forward = Precision(network, device, config.precision == "bf16")
        self.optimizer = GuardedAdam(network.parameters(), optimizer, fused=device.type == "cuda")
        self.local = forward
        self.forward: nn.Module = self._wrap(forward, config, batch)
        updates = 0.0 if state is None else float(state["updates"])
        self.optimizer.prime(self._stored_parameters(), updates)
        if state is not None:
            self._restore_moments(state)
        if optimizer.ema:
            weights = None if state is None else state.get("ema")
            self.ema = MovingAverage(optimizer.ema, self.shards(), self._as_shards(weights))

    # Overridden by `DeepSpeedEngine` ---------------------------------------------------------

    def _wrap(self, forward: nn.Module, config: EngineConfig, batch: int) -> nn.Module:
        return forward

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def _update(self, withheld: Tensor) -> Tensor:
        """Clip, update and clear the gradients, unless the update is withheld; returns whether it was (a bool)."""
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm or float("inf"))
        withheld = withheld | ~torch.isfinite(norm)
        self.optimizer.withheld = withheld.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return withheld

    def _stored_parameters(self) -> list[Tensor]:
        """The tensors that the optimiser updates."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def shards(self) -> list[Tensor]:
        """The part of each parameter that this process stores (all of it in this class)."""
        return [parameter.data for parameter in self.network.parameters()]

    def _as_shards(self, weights: Mapping[str, Tensor] | None) -> list[Tensor] | None:
        if weights is None:
            return None
        return [weights[name].to(self.device) for name in self.names]

    def _moment(self, parameter: Tensor, key: str) -> Tensor:
        return self.optimizer.state[parameter][key]

    def _set_moment(self, parameter: Tensor, key: str, value: Tensor) -> None:
        self.optimizer.state[parameter][key].copy_(value)

    # Common to both --------------------------------------------------------------------------

    def step(
        self,
        z_BD: Tensor,
        weight_B: Tensor,
        loss_of: Callable[[Any, slice], Tensor],
        lr: float,
        piggyback_K: Tensor | None = None,
        hold: bool = False,
    ) -> StepResult:
        """`launch`, and wait for the result."""
        return self.launch(z_BD, weight_B, loss_of, lr, piggyback_K, hold).fetch()()

    def launch(
        self,
        z_BD: Tensor,
        weight_B: Tensor,
        loss_of: Callable[[Any, slice], Tensor],
        lr: float,
        piggyback_K: Tensor | None = None,
        hold: bool = False,
    ) -> LaunchedStep:
        """Queue one update from the mean loss over the real rows of all workers.

        Whether it is applied is decided on the device, so that the host may queue the next step meanwhile. (ZeRO 1-3
        wait: DeepSpeed reads its gradient norm and its overflow flag.)

        Args:
            z_BD: inputs of this worker's batch, cut into `accumulation` micro-batches.
            weight_B: 1 for a real row, 0 for padding; on the device.
            loss_of: (outputs of a slice of the batch, the slice) -> loss per row.
            lr: learning rate of this step.
            piggyback_K: a few float32 numbers, equally many on every worker; their sums over workers are returned with
                the loss, in the same all-reduce. They are read after `loss_of` was called, which may set them.
            hold: compute everything, but change nothing.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        real_rows = all_sum(weight_B.sum())
        scale = real_rows.new_full((), self.world) / real_rows.clamp(min=1)  # gradients are averaged over workers
        micro = -(-len(z_BD) // self.accumulation)
        grads: list[Tensor] = []
        total = torch.zeros((), device=self.device)
        with pending_statistics(self.network) as statistics:
            for start in range(0, len(z_BD), micro):
                part = slice(start, start + micro)
                z_part_BD = z_BD[part].detach().requires_grad_()
                fake_BCHW = self.forward(z_part_BD, weight_B[part])
                # where() instead of a product: a padding row may be non-finite, and 0 x inf is NaN
                loss_B = torch.where(weight_B[part] > 0, loss_of(fake_BCHW, part), 0.0)
                last = start + micro >= len(z_BD)
                self._backward(loss_B.sum() * scale, last)
                grads.append(cast(Tensor, z_part_BD.grad) / scale)
                total += loss_B.detach().sum()
        grad_BD = torch.cat(grads)
        exchanged = torch.stack([total, gradient_fault(grad_BD) + statistics.fault(self.device)])
        if piggyback_K is not None:
            exchanged = torch.cat([exchanged, self.upload(piggyback_K)])
        summed = all_sum(exchanged)
        # A NaN or infinity on one worker makes the sum non-finite on all, so all workers decide alike. A batch without
        # a real row is no step: momentum alone would move the weights.
        withheld = self._update(~torch.isfinite(summed[:2]).all() | (real_rows == 0) | hold)
        statistics.commit(~withheld)
        if self.ema:
            self.ema.update(self.shards(), ~withheld)
        return LaunchedStep(grad_BD, torch.cat([summed[:1], withheld[None], real_rows[None], summed[2:]]))

    @torch.no_grad()
    def draw(self, z_BD: Tensor, weight_B: Tensor) -> Tensor:
        """What the network makes of inputs in training, for the step of another one; nothing changes. Collective."""
        with frozen_statistics(self.network):
            return self.forward(z_BD, weight_B)

    def weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """Whole fp32 weights and buffers by name, on the CPU; of the moving average if there is one. Collective."""
        held = self.lazy_state()
        chosen = held["weights"] | (held.get("ema", {}) if averaged else {})
        return {name: tensor.whole().to("cpu", copy=True) for name, tensor in chosen.items()}

    def lazy_state(self) -> dict[str, Any]:
        """The state to resume from, by parameter name and independent of W, without copying it.

        `weights`, `ema` (if on), `exp_avg`, `exp_avg_sq`: dictionaries of `LazyTensor`, which all workers must gather
        in the same order and before the next step; `updates`: Adam's step count.
        """
        parameters = dict(self.network.named_parameters())

        def lazy(of: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor]) -> dict[str, LazyTensor]:
            width = {name: 4 if tensor.is_floating_point() else tensor.element_size() for name, tensor in of.items()}
            sizes = {name: width[name] * full_shape(tensor).numel() for name, tensor in of.items()}
            return {name: LazyTensor(sizes[name], partial(whole, tensor)) for name, tensor in of.items()}

        state: dict[str, Any] = {"weights": lazy(self.network.state_dict(keep_vars=True), self._whole)}
        if self.ema:
            averages = dict(zip(map(id, parameters.values()), self.ema.shards, strict=True))
            state["ema"] = lazy(parameters, lambda parameter: self._whole_of(parameter, averages[id(parameter)]))
        for key in self.optimizer.moments:
            state[key] = lazy(parameters, partial(self._moment, key=key))
        state["updates"] = self.optimizer.updates
        return state

    def state(self) -> dict[str, Any]:
        """The tensors of `lazy_state` as whole copies on the CPU of every worker. Collective."""
        return {
            key: {name: tensor.whole().to("cpu", copy=True) for name, tensor in held.items()}
            if isinstance(held, dict)
            else held
            for key, held in self.lazy_state().items()
        }

    def _whole(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer in fp32; integer tensors unchanged."""
        return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()

    def _whole_of(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """A tensor of a parameter's shape that is stored in the same shards, in fp32."""
        return shard.float()

    def _restore_moments(self, state: Mapping) -> None:
        for key in self.optimizer.moments:
            for name, parameter in zip(self.names, self.network.parameters(), strict=True):
                self._set_moment(parameter, key, state[key][name].to(self.device))


class MovingAverage:
    """Exponential moving average of the stored shards of the weights."""

    def __init__(self, decay: float, shards: list[Tensor], start: list[Tensor] | None = None) -> None:
        self.decay = decay
        self.shards = [shard.detach().clone() for shard in (shards if start is None else start)]

    @torch.no_grad()
    def update(self, shards: list[Tensor], applied: Tensor) -> None:
        """Move the average towards these weights by `1 - decay`, if the step was applied (a bool on their device)."""
        share = (1 - self.decay) * applied
        torch._foreach_lerp_(self.shards, shards, [share] * len(shards))


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, also if ZeRO 3 partitions it."""
    return getattr(parameter, "ds_shape", parameter.shape)
