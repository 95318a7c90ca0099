"""Checkpoints: a folder `step-000123/` of safetensors and JSON that knows no number of workers.

    generator.safetensors ...            tensors by name, one file a group, written by rank 0
    latents-<start>-<stop>.safetensors   rows start..stop-1 of the latent table, written by their owners
    state.json                           counters and seeds
    manifest.json                        files, sizes, SHA-256: written last; no manifest, no checkpoint

Saving is collective and asynchronous. What is to be saved is copied at once; a thread then writes it.
The ranks meet in the store itself: each leaves `part-<rank>.json` with the hashes of its files, rank 0
waits for all of them and writes the manifest, and every rank waits for that. So a collective
operation of the training never mixes with one of the saving, and whoever does not arrive can be named.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from ..datasets.storage import MissingObject, Store
from ..errors import EnvironmentFault, UserError
from .checkpoint_layout import (
    FOLDER,
    ROWS,
    File,
    Files,
    Manifest,
    Part,
    check_cover,
    checked_safetensors,
    committed_steps,
    complete,
    folder_name,
    load_manifest,
    parse,
    read_verified,
    row_blocks,
)

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

_GROUP = re.compile(r"^[a-z][a-z0-9_-]{0,63}$")
_BLOCK_BYTES = 256 << 20  # a block of rows is held, hashed and sent as one piece
_POLL_S = (0.02, 1.0)  # first and longest pause while waiting for another rank
_ROW_TYPES = ("float32", "int32")


@dataclass(frozen=True)
class SaveReport:
    """What a finished save cost this rank: its own bytes, and the seconds until all ranks were done."""

    step: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    step: int
    tensors: Mapping[str, dict[str, Tensor]]
    first_row: int
    latents: Arrays
    state: Mapping[str, Any] | None
    score: float | None


class CheckpointWriter:
    """Writes the checkpoints of a run; every rank holds one and calls `save` at the same steps."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        keep: int,
        timeout: float,
        attempt: str | None = None,
        block_bytes: int = _BLOCK_BYTES,
    ):
        """Made by all ranks together, in the thread that uses torch.distributed.

        Args:
            keep: how many checkpoints stay, besides the best by score.
            timeout: seconds that ranks wait for one another.
            attempt: names this start of the workers, so that what a killed one left behind is never
                taken for a part of this one. None: rank 0 removes such left-overs and draws a name
                for all ranks.
            block_bytes: size of a block of latent rows.
        """
        self._store, self._rank, self._world, self._keep = store, rank, world, keep
        self._timeout, self._block_bytes = timeout, block_bytes
        self._attempt = _begin(store, rank, world) if attempt is None else attempt
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._report: SaveReport | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
        latents: tuple[int, Arrays] | None = None,
        state: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Start saving; returns once everything is copied, so training may go on and change it.

        A step that is saved already is left as it is.

        Args:
            step: of the whole run; it names the checkpoint.
            tensors: groups of named tensors. Only rank 0's are written.
            latents: the first of this rank's rows, and arrays of one entry a row (`LatentTable.snapshot`).
            state: what JSON can hold. Only rank 0's is written.
            score: lower is better; the best checkpoint is kept however old it is. Rank 0's counts.
        Raises:
            The error of the previous save, if it failed.
        """
        self.wait()
        groups = {name: _to_cpu(group) for name, group in (tensors or {}).items()} if self._rank == 0 else {}
        for name in groups:
            if not _GROUP.match(name) or name.startswith("latents"):
                raise ValueError(f"{name!r} cannot be the name of a group of tensors")
        start, arrays = latents or (0, {})
        if len({len(array) for array in arrays.values()}) > 1:
            raise ValueError(f"latent arrays of different lengths: {[len(array) for array in arrays.values()]}")
        # Ray's arrays are read-only and nobody else's; any other may change while it is being written.
        held = {name: array.copy() if array.flags.writeable else array for name, array in arrays.items()}
        job = _Job(step, groups, start, held, state if self._rank == 0 else None, score)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> SaveReport | None:
        """Wait until the save under way, if any, is committed by all ranks; raises its error.

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
        began, folder = time.monotonic(), folder_name(job.step)
        if job.step in complete(self._store, job.step):
            log.info("step %d is saved already", job.step)
            return
        files: Files = {}
        for name, data in self._pieces(job):
            self._store.write(f"{folder}/{name}", data)
            files[name] = File(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        part = Part(attempt=self._attempt, world=self._world, files=files)
        self._store.write(f"{folder}/part-{self._rank}.json", part.model_dump_json().encode())
        if self._rank == 0:
            self._commit(job, folder)
        else:
            self._wait_until(lambda: self._committed(folder), folder, job.step)
        written, seconds = sum(file.size for file in files.values()), time.monotonic() - began
        self._report = SaveReport(job.step, written, seconds)
        log.info("saved step %d: %.1f MB of rank %d in %.2f s", job.step, written / 1e6, self._rank, seconds)
        if self._rank == 0:
            retain(self._store, self._keep)

    def _pieces(self, job: _Job) -> Iterator[tuple[str, bytes]]:
        """The files of this rank, one at a time, so that only one is held in its written form."""
        for group, tensors in job.tensors.items():
            yield f"{group}.safetensors", safetensors.torch.save(tensors)
        if job.state is not None:
            yield "state.json", json.dumps(job.state, allow_nan=False, indent=1).encode()
        rows = len(next(iter(job.latents.values()), ()))
        row_bytes = sum(array[:1].nbytes for array in job.latents.values())
        size = max(1, self._block_bytes // max(1, row_bytes))
        for at in range(0, rows, size):
            arrays = {name: np.ascontiguousarray(array[at : at + size]) for name, array in job.latents.items()}
            start, stop = job.first_row + at, job.first_row + min(at + size, rows)
            yield f"latents-{start}-{stop}.safetensors", safetensors.numpy.save(arrays)

    def _commit(self, job: _Job, folder: str) -> None:
        """Rank 0: make it a checkpoint once every rank's part is there."""
        self._wait_until(lambda: len(self._parts(folder)) == self._world, folder, job.step)
        files = {name: file for part in self._parts(folder).values() for name, file in part.files.items()}
        blocks = row_blocks(files)
        rows = blocks[-1].stop if blocks else 0
        check_cover(blocks, range(rows), f"the parts of step {job.step}")
        manifest = Manifest(step=job.step, attempt=self._attempt, rows=rows, score=job.score, files=files)
        self._store.write(f"{folder}/manifest.json", manifest.model_dump_json(indent=1).encode())
        for key in self._store.list(f"{folder}/"):  # the parts, and what a killed attempt left in this folder
            if key.rpartition("/")[2] not in {*files, "manifest.json"}:
                self._store.delete(key)

    def _parts(self, folder: str) -> dict[int, Part]:
        """The parts of this attempt that are there, by rank."""
        parts = {}
        for key in self._store.list(f"{folder}/part-"):
            part = parse(Part, self._store.read(key), key)
            if (part.attempt, part.world) == (self._attempt, self._world):
                parts[int(key.rpartition("-")[2].removesuffix(".json"))] = part
        return parts

    def _committed(self, folder: str) -> bool:
        try:
            data = self._store.read(f"{folder}/manifest.json")
        except MissingObject:
            return False
        return parse(Manifest, data, folder).attempt == self._attempt

    def _wait_until(self, ready: Callable[[], bool], folder: str, step: int) -> None:
        deadline, pause = time.monotonic() + self._timeout, _POLL_S[0]
        while not ready():
            if time.monotonic() > deadline:
                missing = sorted(set(range(self._world)) - set(self._parts(folder))) or [0]
                raise EnvironmentFault(
                    f"saving step {step} gave up after {self._timeout:g} s: no word from rank "
                    f"{', '.join(map(str, missing))}; look at the logs of these workers, or raise checkpoint.timeout_s"
                )
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S[1])


def latest(store: Store) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return max(complete(store), default=None)


def remove_torn(store: Store) -> list[str]:
    """Remove what a killed save left behind: folders without a manifest. Returns their names.

    Only for when nobody saves: the driver calls it before it starts the workers.
    """
    sizes = store.sizes("step-")
    whole = {folder_name(step) for step in committed_steps(sizes)}
    torn = sorted({key.partition("/")[0] for key in sizes if FOLDER.match(key)} - whole)
    for key in sizes:
        if key.partition("/")[0] in torn:
            store.delete(key)
    return torn


def retain(store: Store, keep: int) -> list[int]:
    """Remove complete checkpoints except the newest `keep` and the best by score. Returns the steps removed.

    The manifest goes first, so that a removal cut short leaves no checkpoint rather than half of one.
    """
    found = complete(store)
    scores = {step: manifest.score for step, manifest in found.items() if manifest.score is not None}
    best = min(scores, key=lambda step: (scores[step], -step), default=None)
    removed = [step for step in list(found)[: -max(1, keep)] if step != best]
    for step in removed:
        folder = folder_name(step)
        for key in [f"{folder}/manifest.json", *store.list(f"{folder}/")]:
            store.delete(key)
    return removed


def names(store: Store, step: int) -> list[str]:
    """The groups of tensors that a checkpoint holds."""
    files = load_manifest(store, step).files
    return sorted(n.removesuffix(".safetensors") for n in files if n.endswith(".safetensors") and not ROWS.match(n))


def load_state(store: Store, step: int) -> dict[str, Any]:
    """The counters and seeds that were saved. Raises UserError if they are not what was written."""
    data = read_verified(store, load_manifest(store, step), "state.json")
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{store.url}/{folder_name(step)}/state.json is not valid JSON: {error}") from error
    if not isinstance(state, dict):
        raise UserError(f"{store.url}/{folder_name(step)}/state.json does not hold an object")
    return state


def load_tensors(store: Store, step: int, group: str) -> dict[str, Tensor]:
    """A group of tensors by name, on the CPU. Raises UserError if it is not what was written."""
    name = f"{group}.safetensors"
    data = read_verified(store, load_manifest(store, step), name)
    with checked_safetensors(f"{store.url}/{folder_name(step)}/{name}", data):
        return safetensors.torch.load(data)


def load_rows(store: Store, step: int, rows: range) -> Arrays:
    """The latent table of any range of rows, whatever ranges wrote it, for `LatentTable.restore`.

    Raises:
        UserError: a row is missing, or a block is not what was written.
    """
    manifest = load_manifest(store, step)
    where = f"{store.url}/{folder_name(step)}"
    blocks = [block for block in row_blocks(manifest.files) if block.start < rows.stop and rows.start < block.stop]
    check_cover(blocks, rows, where)
    arrays: Arrays = {}
    for block in blocks:
        name = f"latents-{block.start}-{block.stop}.safetensors"
        data = read_verified(store, manifest, name)
        with checked_safetensors(f"{where}/{name}", data):
            held = safetensors.numpy.load(data)
        _check_block(held, block, arrays, f"{where}/{name}")
        first, last = max(block.start, rows.start), min(block.stop, rows.stop)
        for key, array in held.items():
            target = arrays.setdefault(key, np.empty((len(rows), *array.shape[1:]), array.dtype))
            target[first - rows.start : last - rows.start] = array[first - block.start : last - block.start]
    return arrays


def _check_block(held: Arrays, block: range, before: Arrays, where: str) -> None:
    for name, array in held.items():
        if array.ndim < 1 or len(array) != len(block) or array.dtype.name not in _ROW_TYPES:
            raise UserError(f"{where}: {name} is {array.dtype}{list(array.shape)}, which cannot be {len(block)} rows")
        if before and (name not in before or before[name].shape[1:] != array.shape[1:]):
            raise UserError(f"{where}: {name} does not go with the blocks before it")
    if before and set(before) != set(held):
        raise UserError(f"{where} holds {sorted(held)} where the blocks before it hold {sorted(before)}")


def _begin(store: Store, rank: int, world: int) -> str:
    """A new attempt's name, the same on all ranks, after rank 0 has cleaned up behind the last one."""
    if rank == 0:
        for folder in remove_torn(store):
            log.info("removed %s, which was never finished", folder)
    if world == 1:
        return secrets.token_hex(7)
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    number = torch.tensor(secrets.randbits(56), dtype=torch.int64, device=device)
    dist.broadcast(number, 0)
    return f"{int(number):014x}"


def _to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in CPU memory that share storage with nothing, as safetensors wants them."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in tensors.items()
    }
