"""Collective, asynchronous writer of checkpoints: folders `step-000123/` of safetensors and JSON.

    <attempt>/generator.safetensors ...            tensors by name; a large group is cut into several files
    <attempt>/latents-<start>-<stop>.safetensors   rows start..stop-1 of the latent table, written by their owners
    <attempt>/state.json                           counters and seeds
    manifest.json                                  files, sizes, SHA-256: written last; no manifest, no checkpoint
    ../best.json                                   the checkpoint whose samples measured best (`best`)

The format does not depend on the number of workers. Every rank copies its share of the tensors at once, a thread sends
it, and the rank's latent shard sends its own rows. The ranks synchronise through the store: each writes
`part-<rank>.json` with the hashes of its files, rank 0 waits for all of them and writes the manifest, and every rank
waits for that. So saving uses no collective operation that could mix with those of the training, and a missing rank can
be named. Each start of the workers (attempt) has a folder of its own and the manifest is never overwritten, so two
concurrent writers cannot mix their files.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import EnvironmentFault, UserError
from ...models.comm import broadcast
from ...storage.base import MissingObject, ObjectExists, Store
from .best import Best, write_best
from .layout import (
    DAMAGED,
    MANIFEST,
    DamagedCheckpoint,
    Files,
    Manifest,
    Part,
    check_cover,
    check_sizes,
    file_key,
    folder_name,
    load_manifest,
    row_blocks,
    survey,
)
from .parts import Parts, together
from .pieces import BLOCK_BYTES, Groups, copy_share, put, serialized
from .retention import remove_torn, retain

log = logging.getLogger(__name__)
_POLL_S = (0.02, 1.0)  # first and longest pause while waiting for another rank
_REQUESTS_PER_S = 100  # of all ranks together while they wait


class Rows(Protocol):
    """Holder of this rank's rows of the latent table (`LatentTable`)."""

    def start_saving(self, store: Store, folder: str, block_bytes: int) -> Callable[[], Files | None]:
        """Start writing a snapshot of the rows; the callable returns the files, or None until all are written."""


@dataclass(frozen=True)
class SaveReport:
    """Cost of a finished save: bytes that this rank wrote, and seconds until all ranks had finished."""

    step: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    step: int
    share: dict[str, dict[str, Tensor]]
    rows: Callable[[], Files | None]
    state: Mapping[str, Any] | None
    score: Callable[[], Best | None]


class CheckpointWriter:
    """Writer of the checkpoints of a run; every rank has one and calls `save` at the same steps."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        keep: int,
        timeout: float,
        attempt: str | None = None,
        block_bytes: int = BLOCK_BYTES,
        fence: Callable[[], None] = lambda: None,
        on_commit: Callable[[int], None] = lambda step: None,
    ):
        """Collective: all ranks construct it together, in the thread that uses torch.distributed.

        Args:
            keep: number of checkpoints to retain, besides the best.
            timeout: seconds that ranks wait for one another.
            attempt: id of this start of the workers, which keeps its files apart from those of a killed one.
                None: rank 0 removes the remains of earlier attempts and draws an id for all ranks.
            block_bytes: size of a file of tensors or of latent rows.
            fence: raises if another command has taken over the run; rank 0 calls it before a commit or a removal.
            on_commit: rank 0 calls it with the step of a checkpoint that is complete, in the thread that wrote it.
        """
        self._store, self._rank, self._world, self._keep = store, rank, world, keep
        self._timeout, self._block_bytes, self._fence, self._on_commit = timeout, block_bytes, fence, on_commit
        self._attempt = self._begin() if attempt is None else attempt
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._report: SaveReport | None = None

    def save(
        self,
        step: int,
        tensors: Groups | None = None,
        latents: Rows | None = None,
        state: Mapping[str, Any] | None = None,
        score: Callable[[], Best | None] = lambda: None,
    ) -> None:
        """Start saving; returns once everything is copied, so that training may continue and change it.

        A step that is saved already stays unchanged.

        Args:
            step: of the whole run; it names the checkpoint.
            tensors: groups of named tensors, the same on every rank; each copies and writes its share.
            latents: holder of this rank's rows.
            state: values that JSON can represent; rank 0's is written.
            score: called by rank 0's thread once the checkpoint is committed, and may wait: what it measured, if it is
                the best, which is then retained whatever its age.
        Raises:
            The error of the previous save, if it failed.
        """
        report = self.wait()
        if report is not None and report.step == step:
            return
        # The rows first: their holder starts writing while the tensors are copied here.
        rows = latents.start_saving(self._store, self._folder(step), self._block_bytes) if latents else dict
        share = copy_share(tensors or {}, self._rank, self._world, self._block_bytes)
        job = _Job(step, share, rows, state if self._rank == 0 else None, score)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    @property
    def saving(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> SaveReport | None:
        """Wait until the save in progress, if any, is committed by all ranks; raises its error.

        Returns:
            The report of the last save.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._report

    def _run(self, job: _Job) -> None:
        try:
            self._save(job)
        except BaseException as error:  # raised by the next `save` or `wait`
            self._error = error

    def _save(self, job: _Job) -> None:
        if self._rank == 0:
            self._fence()
        if job.step in survey(self._store, job.step).good:
            log.info("step %d is saved already", job.step)
            for name in self._written_rows(job):
                self._store.delete(f"{self._folder(job.step)}/{name}")
        else:
            self._write_and_commit(job)
        if self._rank == 0:
            best = job.score()
            self._fence()
            if best is not None:
                write_best(self._store, best)
            retain(self._store, self._keep)

    def _write_and_commit(self, job: _Job) -> None:
        began, before = time.monotonic(), self._committed(job.step)
        files = self._write(job)
        part = Part(attempt=self._attempt, world=self._world, files=files)
        prefix = f"{self._folder(job.step)}/part-"
        self._store.write(f"{prefix}{self._rank}.json", part.model_dump_json().encode())
        parts = Parts(self._store, prefix, self._attempt, self._world)
        if self._rank == 0:
            self._commit(job, parts, lambda: self._committed(job.step) not in (None, before))
        else:
            self._wait_until(lambda: self._committed(job.step) not in (None, before), job.step, parts)
        written, seconds = sum(file.size for file in files.values()), time.monotonic() - began
        self._report = SaveReport(job.step, written, seconds)
        log.info("saved step %d: %.1f MB of rank %d in %.2f s", job.step, written / 1e6, self._rank, seconds)
        if self._rank == 0:
            self._on_commit(job.step)

    def _write(self, job: _Job) -> Files:
        """Send this rank's share, freeing each file's copy once it is sent."""
        files: Files = {}
        for name in list(job.share):
            files[name] = put(self._store, f"{self._folder(job.step)}/{name}", serialized(job.share.pop(name)))
        if job.state is not None:
            data = json.dumps(job.state, allow_nan=False, indent=1).encode()
            files["state.json"] = put(self._store, f"{self._folder(job.step)}/state.json", iter([memoryview(data)]))
        return files | self._written_rows(job)

    def _written_rows(self, job: _Job) -> Files:
        """Wait for the files of latent rows; raises their holder's error."""
        pause = _POLL_S[0]
        while (files := job.rows()) is None:
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S[1])
        return files

    def _commit(self, job: _Job, parts: Parts, by_another: Callable[[], bool]) -> None:
        """Rank 0: write the manifest once every rank's part is written."""
        self._wait_until(lambda: not parts.missing() or by_another(), job.step, parts)
        if by_another():
            raise self._overtaken(job.step)
        files = {name: file for part in parts.by_rank().values() for name, file in part.files.items()}
        blocks = row_blocks(files)
        rows = blocks[-1].stop if blocks else 0
        check_cover(blocks, range(rows), f"the parts of step {job.step}")
        manifest = Manifest(step=job.step, attempt=self._attempt, rows=rows, files=files)
        folder = folder_name(job.step)
        try:
            check_sizes(self._store, manifest, self._store.sizes(f"{folder}/{self._attempt}/"))
        except DamagedCheckpoint as error:
            raise EnvironmentFault(f"step {job.step} was not stored as it was sent: {error}") from error
        self._fence()
        if job.step in survey(self._store, job.step).damaged:
            for name in (MANIFEST, DAMAGED):  # from here on the damaged checkpoint is incomplete
                self._store.delete(f"{folder}/{name}")
        try:
            data = manifest.model_dump_json(indent=1).encode()
            self._store.write(f"{folder}/{MANIFEST}", data, only_if_absent=True)
        except ObjectExists as error:  # possibly by our own earlier request whose answer was lost
            if self._committed(job.step) != self._attempt:
                raise self._overtaken(job.step) from error
        whole = {file_key(manifest, name) for name in files} | {f"{folder}/{MANIFEST}"}
        beside = [key for key in self._store.list(f"{folder}/") if key not in whole]
        together(self._store.delete, beside)  # the parts, and files of a killed attempt

    def _overtaken(self, step: int) -> UserError:
        return UserError(
            f"{self._store.url}/{folder_name(step)} was written by another command at the same moment; only one may "
            "train a run: stop the other, then start this one again"
        )

    def _folder(self, step: int) -> str:
        return f"{folder_name(step)}/{self._attempt}"

    def _committed(self, step: int) -> str | None:
        """The attempt that committed this step, if any; empty if its manifest is damaged."""
        try:
            return load_manifest(self._store, step).attempt
        except MissingObject:
            return None
        except DamagedCheckpoint:
            return ""

    def _wait_until(self, ready: Callable[[], bool], step: int, parts: Parts) -> None:
        deadline, pause = time.monotonic() + self._timeout, _POLL_S[0]
        longest = max(_POLL_S[1], self._world / _REQUESTS_PER_S)  # a store is shared by all ranks
        while not ready():
            if time.monotonic() > deadline:
                missing = parts.missing() or [0]
                raise EnvironmentFault(
                    f"saving step {step} timed out after {self._timeout:g} s: nothing from rank "
                    f"{', '.join(map(str, missing))}; look at the logs of these workers, or raise checkpoint.timeout_s"
                )
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _begin(self) -> str:
        """A new attempt id, the same on all ranks, after rank 0 has removed the remains of earlier attempts."""
        if self._rank == 0:
            self._fence()
            for folder in remove_torn(self._store):
                log.info("removed %s, an unfinished save", folder)
        if self._world == 1:
            return secrets.token_hex(7)
        device = "cuda" if "nccl" in dist.get_backend() else "cpu"
        number = torch.tensor(secrets.randbits(56), dtype=torch.int64, device=device)
        return f"{int(broadcast(number)):014x}"
