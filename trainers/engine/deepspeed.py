"""One optimiser step of a network through DeepSpeed; the only file that imports DeepSpeed.

Weights are fp32 and the network runs under autocast when `precision` is bf16, as in the plain engine; both give the
same numbers (compared in a test).

Shapes: W workers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...cluster.placement import Share
from ...config.sections import EngineConfig
from ...models.comm import rank
from .step import Engine, full_shape

LARGEST_BUCKET = 500_000_000  # numbers; DeepSpeed's default


class DeepSpeedEngine(Engine):
    """The same step through DeepSpeed, with ZeRO 0-3 over all workers.

    The process group must exist already (Ray Train makes it). Several engines may train side by side in one process;
    all workers build, step and save them in the same order.
    """

    def _wrap(self, forward: nn.Module, config: EngineConfig, batch: int) -> nn.Module:
        deepspeed = import_deepspeed(self.device)
        self.zero = config.zero
        micro = Share(batch, 0, self.world, self.accumulation).size // self.accumulation
        settings = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip_norm,
            "zero_optimization": {
                "stage": self.zero,
                "reduce_bucket_size": bucket_size(sum(parameter.numel() for parameter in forward.parameters())),
            },
            "zero_allow_untested_optimizer": True,  # GuardedAdam is torch's Adam
            "steps_per_print": None,
        }
        self.runtime, *_ = deepspeed.initialize(
            model=forward, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        return self.runtime

    def _backward(self, loss: Tensor, last: bool) -> None:
        # the loss is already scaled for the whole step: do not divide by the accumulation steps again
        self.runtime.backward(loss, scale_wrt_gas=False)
        if not last:
            self.runtime.step()  # counts the micro-batch

    def _update(self, withheld: Tensor) -> Tensor:
        if self.zero == 0:  # ZeRO 1-3 check their gradients themselves
            grads = [p.grad for p in self.network.parameters() if p.grad is not None]
            withheld = withheld | ~torch.isfinite(nn.utils.get_total_norm(grads))
        self.optimizer.withheld = withheld.float()
        self.runtime.step()
        return withheld | (not self.runtime.was_step_applied())

    def _stored_parameters(self) -> list[Tensor]:
        if self.zero == 3:  # ZeRO 3 removes them from the parameter groups between steps
            return list(self.runtime.optimizer.fp32_partitioned_groups_flat)
        return super()._stored_parameters()

    def shards(self) -> list[Tensor]:
        if self.zero == 3:
            return [cast(Any, parameter).ds_tensor.data for parameter in self.network.parameters()]
        return super().shards()

    def _as_shards(self, weights: Mapping[str, Tensor] | None) -> list[Tensor] | None:
        whole = super()._as_shards(weights)
        if whole is None or self.zero < 3:
            return whole
        return [self._cut(value, shard.numel()) for value, shard in zip(whole, self.shards(), strict=True)]

    def _moment(self, parameter: Tensor, key: str) -> Tensor:
        if self.zero == 0:
            return super()._moment(parameter, key)
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key).reshape(full_shape(parameter))

    def _set_moment(self, parameter: Any, key: str, value: Tensor) -> None:
        if self.zero == 0:
            super()._set_moment(parameter, key, value)
        elif self.zero == 3:
            # DeepSpeed's own setter overruns a parameter whose size W does not divide
            stored, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, False, key)
            stored.copy_(self._cut(value, stored.numel()))
        else:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value, key)

    def _restore_moments(self, state: Mapping) -> None:
        if self.zero in (1, 2):
            self.runtime.optimizer._lazy_init_hp_params_optimizer_state()  # needs the primed state
        super()._restore_moments(state)

    def lazy_state(self) -> dict[str, Any]:
        if self.zero in (1, 2):
            self.runtime.optimizer._lazy_init_hp_params_optimizer_state()
        return super().lazy_state()

    def _whole(self, tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_tensor"):
            return super()._whole(tensor)
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().float().clone()

    def _whole_of(self, parameter: Tensor, shard: Tensor) -> Tensor:
        if self.zero < 3:
            return super()._whole_of(parameter, shard)
        parts = [torch.empty_like(shard) for _ in range(self.world)]
        dist.all_gather(parts, shard)
        shape = full_shape(parameter)
        return torch.cat(parts)[: shape.numel()].reshape(shape).float()

    def _cut(self, value: Tensor, numel: int) -> Tensor:
        """This worker's partition of a whole tensor, zero-padded as ZeRO 3 pads."""
        padded = torch.zeros(numel * self.world, device=value.device, dtype=value.dtype)
        padded[: value.numel()] = value.flatten()
        return padded[rank() * numel :][:numel]


def bucket_size(parameters: int) -> int:
    """Gradients, in float32, that ZeRO 1-3 add up over the workers at a time, in a buffer of this size.

    DeepSpeed's default allocates 2 GB for a model of any size.
    """
    return min(parameters, LARGEST_BUCKET)


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, configured to compile nothing at run time."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # its autotuner would import mlflow, which takes most of the start-up time of a restarted worker
    hidden = "mlflow" not in sys.modules and sys.modules.setdefault("mlflow", cast(Any, None)) is None
    try:
        import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its C++ build takes a minute
    return deepspeed
