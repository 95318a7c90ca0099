"""The storage of the latent table: the codes of a range of rows, their optimiser state, and all the arithmetic.

One thread calls it; snapshots are written by threads of their own.

Legend: B rows of a batch, D latent dimension, n rows of the shard.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..models.noise import Stream, noise
from ..models.sphere import Constraint, project_rows
from ..storage.base import Store
from .checkpoints.layout import Files
from .checkpoints.pieces import write_rows
from .row_optimizers import Name, Visit, row_optimizer, usable_rows
from .snapshot import Snapshot

Position = tuple[int, int]  # (epoch, step)
Arrays = dict[str, np.ndarray]
Rows = np.ndarray | Sequence[int]  # global row ids
START: Position = (-1, -1)


def first_codes(seed: int, rows_B: Tensor, dim: int, scale: float | None = None) -> Tensor:
    """The codes z_BD that rows start from, float32.

    Args:
        scale: None puts them on the unit sphere, uniformly. Else they are N(0, scale^2) on each axis, as in the
            published code (0.01), and lie on the sphere, in the same direction, after their first visit.
    """
    normal_BD = noise(seed, 0, rows_B, dim, stream=Stream.LATENTS)
    return project_rows(normal_BD, "sphere", normal_BD) if scale is None else scale * normal_BD


class LatentShard:
    """Codes z_nD, optimiser moments and visit counters of a contiguous range of global rows."""

    def __init__(
        self,
        rows: range,
        dim: int,
        seed: int,
        optimizer: Name = "adam",
        betas: tuple[float, float] = (0.5, 0.999),
        constraint: Constraint = "sphere",
        batch: int = 1,
        init_scale: float | None = None,
    ):
        """Initialise every code, a function of (seed, row) alone; see `first_codes`.

        Args:
            batch: images of a batch, which the published optimiser takes the mean over.
            init_scale: see `first_codes`.
        """
        self.rows = rows
        self.position = START
        self._optimizer = row_optimizer(optimizer, betas, batch)
        self._constraint: Constraint = constraint
        self._small_start = init_scale is not None
        self._z_nD = first_codes(seed, torch.arange(rows.start, rows.stop), dim, init_scale)
        self._moments_n = self._optimizer.moments(len(rows), dim)
        self._visits_n = torch.zeros(len(rows), dtype=torch.int32)
        self._snapshots: list[Snapshot] = []
        self._saving: Future[Files] = Future()

    def gather(self, rows_B: Rows) -> np.ndarray:
        """Codes z_BD (float32, a copy) of global rows, projected; repeats are allowed."""
        return self._projected(self._z_nD.index_select(0, self._local(rows_B))).numpy()

    def codes(self) -> np.ndarray:
        """All codes z_nD of the shard (float32, a copy), projected."""
        return self._projected(self._z_nD.clone()).numpy()

    def visits(self) -> np.ndarray:
        """Visit count of each row, int32 [n] (a copy)."""
        return self._visits_n.numpy().copy()

    def apply(
        self,
        epoch: int,
        step: int,
        rows_B: Rows,
        grad_BD: np.ndarray,
        lr: float,
        skipped: Rows = (),
        steps: int = 0,
    ) -> bool:
        """Visit rows: an optimiser step and a projection for each of `rows_B`, none for `skipped`.

        Args:
            epoch, step: position in the run. A call whose position is not after the last one has no effect, so that
                a repeated call is harmless.
            rows_B: distinct global rows, without those that only pad a batch.
            grad_BD: gradient of each row's own loss.
            skipped: rows that count as visited but do not move (a corrupt image, a non-finite step).
            steps: steps of the epoch; needed by the published optimiser only.
        Returns:
            Whether the call had an effect.
        Raises:
            IndexError: a row outside the shard. ValueError: a repeated row or a wrong shape.
            UserError: a gradient that is not finite.
            In all cases the shard is unchanged.
        """
        if (epoch, step) <= self.position:
            return False
        visited = np.concatenate([np.asarray(rows_B, np.int64), np.asarray(skipped, np.int64)])
        if len(set(visited.tolist())) != len(visited):
            raise ValueError(f"a row occurs twice at epoch {epoch}, step {step}")
        visited_at = self._local(visited)
        at_B, skipped_at = visited_at.split([len(rows_B), len(skipped)])
        if grad_BD.shape != (len(at_B), self._z_nD.shape[1]):
            raise ValueError(f"gradient of shape {grad_BD.shape} for {len(at_B)} codes")
        gradient_BD = torch.tensor(grad_BD, dtype=torch.float32)  # a copy: arrays from Ray are read-only
        self._refuse_unusable(gradient_BD, at_B)
        moved = self._moved(at_B, gradient_BD, Visit(lr, step, steps))
        self._preserve(visited_at)
        self._visits_n.index_add_(0, visited_at, torch.ones(len(visited_at), dtype=torch.int32))
        if len(skipped_at):
            self._z_nD[skipped_at] = self._projected(self._z_nD[skipped_at])
        for name, value_B in moved.items():  # index_copy_ takes half the time of an assignment to an index
            (self._z_nD if name == "z" else self._moments_n[name]).index_copy_(0, at_B, value_B)
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

    def replace(self, rows_B: Rows, z_BD: np.ndarray) -> None:
        """Give distinct rows the codes that an encoder has for them; neither moments nor visits change.

        Raises:
            IndexError: a row outside the shard. ValueError: a wrong shape. UserError: a code that is not finite.
        """
        at_B, codes_BD = self._local(rows_B), torch.tensor(z_BD, dtype=torch.float32)  # a copy, as in `apply`
        if codes_BD.shape != (len(at_B), self._z_nD.shape[1]):
            raise ValueError(f"codes of shape {tuple(codes_BD.shape)} for {len(at_B)} rows")
        finite_B = codes_BD.isfinite().all(1)
        if not finite_B.all():
            rows = (at_B[~finite_B] + self.rows.start).tolist()
            raise UserError(
                f"the codes of rows {rows[:8]} are not finite; lower autoencoder.lr, or look at these images"
            )
        self._preserve(at_B)
        self._z_nD[at_B] = codes_BD

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
        at_B = np.asarray(rows_B, np.int64) - self.rows.start
        if len(at_B) and not (at_B.min() >= 0 and at_B.max() < len(self.rows)):
            raise IndexError(f"a row is outside {self.rows.start}..{self.rows.stop - 1}, which this worker owns")
        return torch.from_numpy(at_B)

    def _refuse_unusable(self, grad_BD: Tensor, at_B: Tensor) -> None:
        usable_B = usable_rows(grad_BD)
        if not usable_B.all():
            rows = (at_B[~usable_B] + self.rows.start).tolist()
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            raise UserError(
                f"the gradient of latent codes is not finite for rows {rows[:8]}{more}; "
                "lower glo.latent_lr or glo.generator_lr, or look at these images"
            )

    def _moved(self, at_B: Tensor, grad_BD: Tensor, visit: Visit) -> dict[str, Tensor]:
        """State of rows after their visit, by name; nothing is changed."""
        moments_B = {name: moment_n.index_select(0, at_B) for name, moment_n in self._moments_n.items()}
        before_BD = self._z_nD.index_select(0, at_B)
        visits_B = self._visits_n.index_select(0, at_B) + 1
        moved_BD = self._optimizer.update(before_BD, grad_BD, moments_B, visits_B, visit)
        return moments_B | {"z": project_rows(moved_BD, self._constraint, self._projected(before_BD))}

    def _projected(self, z_BD: Tensor) -> Tensor:
        """Codes as G sees them: rows that start small lie off the sphere until their first visit."""
        return project_rows(z_BD, self._constraint, z_BD) if self._small_start else z_BD
