"""The latent table: one trainable code per image, with its optimiser state, on the node of its owner.

`LatentTable` is a training worker's interface to its `LatentShard`, which runs in a Ray actor on the same node, so that
gathers and updates overlap with the training step. One epoch visits a row once, so the gather for the next batch and
the update of this one touch different rows, and overlapping them is exact; where they share rows (between two epochs)
the table gathers again.

Legend: B rows of a batch, D latent dimension, n rows of the shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EnvironmentFault
from ..storage.base import Store
from .checkpoints.layout import Files
from .latent_shard import START, Arrays, LatentShard, Position, Rows


class LatentTable:
    """Asynchronous access of a worker to its own latent shard.

    The shard executes calls in order, so the codes are bit for bit those of a synchronous run. The error of a failed
    update is raised within `in_flight` steps, at the latest by the next `flush`.
    """

    def __init__(self, rows: range, shard: _InProcess | _InActor, in_flight: int):
        self.rows = rows
        self._shard = shard
        self._in_flight = in_flight
        self._updates: deque[Any] = deque()
        self._gathers: dict[bytes, tuple[np.ndarray, Any]] = {}

    @classmethod
    def spawn(cls, rows: range, dim: int, seed: int, *, in_flight: int = 8, **options: Any) -> LatentTable:
        """Create the shard in a new actor on this node; the actor ends with the worker that owns it.

        Args:
            in_flight: updates that may be in flight before `apply` waits for the oldest.
            options: further arguments of `LatentShard`.
        """
        return cls(rows, _InActor(rows, dim, seed, **options), in_flight)

    @classmethod
    def in_process(cls, rows: range, dim: int, seed: int, **options: Any) -> LatentTable:
        """Create the shard in this process, without Ray; calls are synchronous."""
        return cls(rows, _InProcess(LatentShard(rows, dim, seed, **options)), 1)

    def prefetch(self, rows_B: Rows) -> None:
        """Start gathering rows for a later `gather`."""
        rows_B = np.ascontiguousarray(rows_B, np.int64)
        self._gathers[rows_B.tobytes()] = (rows_B, self._shard.start("gather", rows_B))

    def gather(self, rows_B: Rows) -> Tensor:
        """Codes z_BD of global rows as a new float32 tensor, after all updates so far."""
        rows_B = np.ascontiguousarray(rows_B, np.int64)
        _, pending = self._gathers.pop(rows_B.tobytes(), (rows_B, None))
        if pending is None:
            pending = self._shard.start("gather", rows_B)
        if self._updates and self._updates[0] is pending:
            self._updates.popleft()  # its result covers both
        return torch.tensor(self._shard.finish(pending))  # a copy: arrays from Ray are read-only

    def apply(
        self,
        epoch: int,
        step: int,
        rows_B: Rows,
        grad_BD: Tensor,
        lr: float,
        skipped: Rows = (),
        ahead_B: Rows | None = None,
        steps: int = 0,
    ) -> None:
        """Start `LatentShard.apply`; the caller may change the arguments as soon as this returns.

        Args:
            steps: steps of the epoch; needed by the published optimiser only.
            ahead_B: rows of a later `gather`, gathered after this update by the same call.
        """
        self._limit_in_flight()
        rows_B = np.array(rows_B, np.int64)
        unmoved = np.array(skipped, np.int64) if len(skipped) else ()  # an empty array would be one more to send
        grad = grad_BD.detach().to("cpu", torch.float32).numpy()
        visit = (epoch, step, rows_B, grad, lr, unmoved, steps)
        if ahead_B is None:
            call = self._shard.start("apply", *visit)
        else:
            ahead_B = np.ascontiguousarray(ahead_B, np.int64)
            call = self._shard.start("apply_and_gather", visit, ahead_B)
        self._updates.append(call)
        # What was gathered ahead of this update is out of date where they share a row.
        moved = set(rows_B.tolist())  # for one batch np.isin takes eight times as long
        stale = [key for key, (ahead_B, _) in self._gathers.items() if not moved.isdisjoint(ahead_B.tolist())]
        for key in stale:
            del self._gathers[key]
        if ahead_B is not None:
            self._gathers[ahead_B.tobytes()] = (ahead_B, call)

    def skip(self, epoch: int, step: int, rows_B: Rows) -> None:
        """Count rows as visited without moving them, such as those of a step that was not finite."""
        self._limit_in_flight()
        self._updates.append(self._shard.start("skip", epoch, step, np.array(rows_B, np.int64)))

    def replace(self, rows_B: Rows, z_BD: Tensor) -> None:
        """Start `LatentShard.replace`."""
        self._limit_in_flight()
        codes = z_BD.detach().to("cpu", torch.float32).numpy()
        self._updates.append(self._shard.start("replace", np.array(rows_B, np.int64), codes))
        self._gathers.clear()  # what was gathered ahead may be out of date

    def flush(self) -> None:
        """Wait for all updates; raise the error of the first that failed."""
        while self._updates:
            self._shard.finish(self._updates.popleft())

    def codes(self) -> Tensor:
        """All codes z_nD of this worker, in the order of its rows, after all updates."""
        self.flush()
        return torch.tensor(self._shard.finish(self._shard.start("codes")))

    def visits(self) -> np.ndarray:
        """Visit count of each row, int32 [n], after all updates; an argument of `epoch_plan` after a restart."""
        self.flush()
        return self._shard.finish(self._shard.start("visits"))

    def snapshot(self) -> Arrays:
        """A consistent copy of the whole shard after all updates."""
        self.flush()
        return self._shard.finish(self._shard.start("snapshot"))

    def start_saving(self, store: Store, folder: str, block_bytes: int) -> Callable[[], Files | None]:
        """Start writing a snapshot of the shard after all updates; see `LatentShard.start_saving`.

        Later calls do not change what is written.

        Returns:
            A callable that returns the files once written, None before, and raises the error of the writing.
        """
        self.flush()
        started = [self._shard.start("start_saving", store, folder, block_bytes)]

        def saved() -> Files | None:
            while started:
                self._shard.finish(started.pop())
            return self._shard.finish(self._shard.start("saved"))

        return saved

    def restore(self, arrays: Arrays, position: Position = START) -> None:
        """Replace the state by saved rows (`checkpoints.reader.load_rows`); see `LatentShard.restore`."""
        self.flush()
        self._gathers.clear()
        self._shard.finish(self._shard.start("restore", arrays, position))

    def close(self) -> None:
        """End the shard at once instead of with this worker."""
        self._updates.clear()
        self._gathers.clear()
        self._shard.close()

    def _limit_in_flight(self) -> None:
        """Wait for the oldest updates while the limit is reached, and not sooner: each wait costs time too."""
        while len(self._updates) >= self._in_flight:
            self._shard.finish(self._updates.popleft())


class _InProcess:
    """Synchronous calls; an error is kept for `finish`, as with an actor."""

    def __init__(self, shard: LatentShard):
        self._target = shard

    def start(self, method: str, *arguments: Any) -> tuple[Any, Exception | None]:
        try:
            return getattr(self._target, method)(*arguments), None
        except Exception as error:
            return None, error

    def finish(self, call: tuple[Any, Exception | None]) -> Any:
        result, error = call
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        del self._target


class _InActor:
    """Calls to a `LatentShard` actor on this node; with one caller and one thread, they run in order."""

    def __init__(self, rows: range, dim: int, seed: int, **options: Any):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self._rows = rows
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # No CPU slot of its own: a worker may already take all of its node's.
        actor_class = ray.remote(LatentShard).options(num_cpus=0, max_restarts=0, scheduling_strategy=here)
        self.actor: Any = actor_class.remote(rows, dim, seed, **options)

    def start(self, method: str, *arguments: Any) -> Any:
        return getattr(self.actor, method).remote(*arguments)

    def finish(self, call: Any) -> Any:
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.ActorDiedError as error:
            if error.actor_init_failed:  # not lost: it never started, for a reason that the driver looks into
                raise
            raise EnvironmentFault(
                f"the process that holds latent rows {self._rows.start}..{self._rows.stop - 1} was lost; "
                "the run can resume from its last checkpoint"
            ) from error

    def close(self) -> None:
        self._ray.kill(self.actor)
