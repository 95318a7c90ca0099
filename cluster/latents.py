"""The latent table: one trainable code per image, with its optimiser state, on the node of its owner.

`LatentShard` stores the codes of one contiguous range of rows and does all the arithmetic. `LatentTable` is a training
worker's interface to its shard, which runs in a Ray actor on the same node, so that gathers and updates overlap with
the training step. One epoch visits a row once, so the gather for the next batch and the update of this one touch
different rows, and overlapping them is exact; where they share rows (between two epochs) the table gathers again.

Legend: B rows of a batch, D latent dimension, n rows of the shard.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import EnvironmentFault, UserError
from ..models.noise import Stream, noise
from ..models.sphere import Constraint, project_rows
from ..storage.base import Store
from .checkpoints.layout import Files
from .checkpoints.pieces import write_rows
from .row_optimizers import row_optimizer, usable_rows
from .snapshot import Snapshot

Position = tuple[int, int]  # (epoch, step)
Arrays = dict[str, np.ndarray]
Rows = np.ndarray | Sequence[int]  # global row ids
START: Position = (-1, -1)


class LatentShard:
    """Codes z_nD, optimiser moments and visit counters of a contiguous range of global rows."""

    def __init__(
        self,
        rows: range,
        dim: int,
        seed: int,
        optimizer: Literal["adam", "adagrad"] = "adam",
        betas: tuple[float, float] = (0.5, 0.999),
        constraint: Constraint = "sphere",
    ):
        """Initialise every code to a random point of the unit sphere, a function of (seed, row) alone."""
        self.rows = rows
        self.position = START
        self._optimizer = row_optimizer(optimizer, betas)
        self._constraint: Constraint = constraint
        first_nD = noise(seed, 0, torch.arange(rows.start, rows.stop), dim, stream=Stream.LATENTS)
        self._z_nD = project_rows(first_nD, "sphere", first_nD)
        self._moments_n = self._optimizer.moments(len(rows), dim)
        self._visits_n = torch.zeros(len(rows), dtype=torch.int32)
        self._snapshots: list[Snapshot] = []
        self._saving: Future[Files] = Future()

    def gather(self, rows_B: Rows) -> np.ndarray:
        """Codes z_BD (float32, a copy) of global rows; repeats are allowed."""
        return self._z_nD[self._local(rows_B)].numpy()

    def codes(self) -> np.ndarray:
        """All codes z_nD of the shard (float32, a copy)."""
        return self._z_nD.numpy().copy()

    def visits(self) -> np.ndarray:
        """Visit count of each row, int32 [n] (a copy)."""
        return self._visits_n.numpy().copy()

    def apply(self, epoch: int, step: int, rows_B: Rows, grad_BD: np.ndarray, lr: float, skipped: Rows = ()) -> bool:
        """Visit rows: an optimiser step and a projection for each of `rows_B`, none for `skipped`.

        Args:
            epoch, step: position in the run. A call whose position is not after the last one has no effect, so that
                a repeated call is harmless.
            rows_B: distinct global rows, without those that only pad a batch.
            grad_BD: gradient of each row's own loss.
            skipped: rows that count as visited but do not move (a corrupt image, a non-finite step).
        Returns:
            Whether the call had an effect.
        Raises:
            IndexError: a row outside the shard. ValueError: a repeated row or a wrong shape.
            UserError: a gradient that is not finite.
            In all cases the shard is unchanged.
        """
        if (epoch, step) <= self.position:
            return False
        at_B, skipped_at = self._local(rows_B), self._local(np.asarray(skipped, np.int64))
        visited_at = torch.cat([at_B, skipped_at])
        if len(visited_at.unique()) != len(visited_at):
            raise ValueError(f"a row occurs twice at epoch {epoch}, step {step}")
        if grad_BD.shape != (len(at_B), self._z_nD.shape[1]):
            raise ValueError(f"gradient of shape {grad_BD.shape} for {len(at_B)} codes")
        gradient_BD = torch.tensor(grad_BD, dtype=torch.float32)  # a copy: arrays from Ray are read-only
        self._refuse_unusable(gradient_BD, at_B)
        self._preserve(visited_at)
        self._visits_n[visited_at] += 1
        self._move(at_B, gradient_BD, lr)
        self.position = (epoch, step)
        return True

    def apply_and_gather(self, visit: tuple[Any, ...], ahead_B: Rows) -> np.ndarray:
        """`apply(*visit)` and then `gather(ahead_B)`, in one remote call with few arguments."""
        self.apply(*visit)
        return self.gather(ahead_B)

    def skip(self, epoch: int, step: int, rows_B: Rows) -> bool:
        """Visit rows without moving them; otherwise as `apply`.

        The visit counts in the bias correction too, since a row has one counter. That weakens the correction of a row
        whose first visits were skipped, for as long as the correction matters.
        """
        nothing = np.empty((0, self._z_nD.shape[1]), np.float32)
        return self.apply(epoch, step, np.empty(0, np.int64), nothing, 0.0, rows_B)

    def snapshot(self) -> Arrays:
        """A consistent copy of the state by name: z, the moments and steps (visits), each with n rows."""
        return {name: tensor.numpy().copy() for name, tensor in self._state().items()}

    def start_saving(self, store: Store, folder: str, block_bytes: int) -> None:
        """Start writing a snapshot of the rows as `latents-*.safetensors` below `folder`, in a thread."""
        snapshot, saving = Snapshot(self._state()), Future[Files]()
        self._snapshots.append(snapshot)
        self._saving = saving

        def write() -> None:
            try:
                saving.set_result(write_rows(store, folder, self.rows.start, snapshot, block_bytes))
            except BaseException as error:  # raised by `saved`
                saving.set_exception(error)
            finally:
                self._snapshots.remove(snapshot)

        threading.Thread(target=write, name="latents", daemon=True).start()

    def saved(self) -> Files | None:
        """The files of the last `start_saving`, or None while they are being written; raises their error."""
        return self._saving.result() if self._saving.done() else None

    def restore(self, arrays: Arrays, position: Position = START) -> None:
        """Replace the state by a snapshot of exactly these rows, as read from a checkpoint.

        Raises:
            UserError: missing or unknown arrays, or another shape or type; the shard is unchanged.
        """
        state = self._state()
        if set(arrays) != set(state):
            raise UserError(
                f"the saved latent table contains {sorted(arrays)}, but {sorted(state)} is needed; "
                "was it trained with another glo.latent_optimizer?"
            )
        for name, tensor in state.items():
            held, needed = arrays[name], tensor.numpy()
            if held.shape != needed.shape or held.dtype != needed.dtype:
                raise UserError(
                    f"the saved latent table has {name} as {held.dtype}{list(held.shape)}, but "
                    f"{needed.dtype}{list(needed.shape)} is needed; resume with the configuration of the run"
                )
        self._preserve(torch.arange(len(self.rows)))
        for name, tensor in state.items():
            tensor.numpy()[...] = arrays[name]
        self.position = position

    def _preserve(self, at_B: Tensor) -> None:
        """Copy rows that are about to change into the snapshots that are still being written."""
        for snapshot in tuple(self._snapshots):  # writing threads remove theirs
            snapshot.preserve(at_B)

    def _state(self) -> dict[str, Tensor]:
        return {"z": self._z_nD, **self._moments_n, "steps": self._visits_n}

    def _local(self, rows_B: Rows) -> Tensor:
        at_B = torch.tensor(rows_B, dtype=torch.int64) - self.rows.start
        if len(at_B) and not (int(at_B.min()) >= 0 and int(at_B.max()) < len(self.rows)):
            raise IndexError(f"a row is outside {self.rows.start}..{self.rows.stop - 1}, which this worker owns")
        return at_B

    def _refuse_unusable(self, grad_BD: Tensor, at_B: Tensor) -> None:
        usable_B = usable_rows(grad_BD)
        if not usable_B.all():
            rows = (at_B[~usable_B] + self.rows.start).tolist()
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            raise UserError(
                f"the gradient of latent codes is not finite for rows {rows[:8]}{more}; "
                "lower glo.latent_lr or glo.generator_lr, or look at these images"
            )

    def _move(self, at_B: Tensor, grad_BD: Tensor, lr: float) -> None:
        moments_B = {name: moment_n[at_B] for name, moment_n in self._moments_n.items()}
        before_BD = self._z_nD[at_B]
        moved_BD = self._optimizer.update(before_BD, grad_BD, moments_B, self._visits_n[at_B], lr)
        self._z_nD[at_B] = project_rows(moved_BD, self._constraint, before_BD)
        for name, moment_B in moments_B.items():
            self._moments_n[name][at_B] = moment_B


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
    ) -> None:
        """Start `LatentShard.apply`; the caller may change the arguments as soon as this returns.

        Args:
            ahead_B: rows of a later `gather`, gathered after this update by the same call.
        """
        self._limit_in_flight()
        rows_B = np.array(rows_B, np.int64)
        unmoved = np.array(skipped, np.int64) if len(skipped) else ()  # an empty array would be one more to send
        grad = grad_BD.detach().to("cpu", torch.float32).numpy()
        visit = (epoch, step, rows_B, grad, lr, unmoved)
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
