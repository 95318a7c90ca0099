"""The training job that the fault tests run on a `cluster_nodes.Cluster`, and how two of its ends are compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from subprocess import Popen
from typing import Any

import numpy as np
from cluster_nodes import BUCKET, Cluster
from glann.cluster.checkpoints import reader
from glann.cluster.checkpoints.layout import survey
from netns import wait_until

ROWS, GLO_EPOCHS, IMLE_EPOCHS, BATCH = 600, 6, 6, 40
DATA = f"s3://{BUCKET}/digits"
# Digits, DeepSpeed, both stages, a checkpoint after each epoch. A step costs milliseconds, so what takes time is what a
# cluster costs. The candidates make a neighbour search as long as the updates, so that a fault can meet either.
OVERRIDES = (
    f"data.url={DATA}",
    "data.cache_dir=shards",
    "generator.width=4",
    "generator.latent_dim=16",
    "loss.kind=l1",
    f"glo.epochs={GLO_EPOCHS}",
    f"glo.batch_size={BATCH}",
    "evaluation.extractor=squeezenet",
    "sampler.kind=imle",
    f"imle.epochs={IMLE_EPOCHS}",
    "imle.batch_size=8",
    "imle.hidden_dim=128",  # this and the schedule whatever the recipe says: losses are compared with a tolerance
    "imle.schedule={kind: constant}",
    "imle.noise_dim=8",
    "imle.candidates=100",
    f"checkpoint.url=s3://{BUCKET}/runs",
    "checkpoint.every_epochs=1",
    "checkpoint.keep=2",
    "preview.every_epochs=8",
    "preview.images=4",
    "evaluation.samples=16",
)


def pack_digits(cluster: Cluster, shard_size_mb: float = 0.02) -> None:
    """Pack the first digits into S3, in small shards, so that the rows of a worker lie in shards of their own."""
    from glann.datasets.assets.catalogue import fetch

    with np.load(fetch("digits")) as digits:
        images = digits[digits.files[0]] if "images" not in digits.files else digits["images"]
        np.savez(cluster.desk / "digits.npz", images=images[:ROWS])
    words = ("data", "pack", "digits.npz", DATA, "--resolution", "28", "--channels", "1")
    log = cluster.logs / "pack.log"
    process = cluster.glann(*words, "--shard-size", str(shard_size_mb), log=log)
    if process.wait(300):
        raise RuntimeError(f"packing failed: {log.read_text()[-2000:]}")


@dataclass(frozen=True)
class End:
    """What the last checkpoint of a run holds. `digest`: of every tensor, by file and name."""

    serial: int
    digest: dict[str, str]
    visits_N: np.ndarray
    state: dict[str, Any]

    def differences(self, other: End) -> list[str]:
        """Names of the tensors that are not bit for bit the same."""
        names = {*self.digest, *other.digest}
        return sorted(name for name in names if self.digest.get(name) != other.digest.get(name))


class Job:
    """One `glann train` on the cluster, which may be started again."""

    def __init__(self, cluster: Cluster, name: str, *overrides: str, workers: int = 2, runs_dir: str = "runs") -> None:
        self.cluster, self.name = cluster, name
        self.words = ("train", "digits", *OVERRIDES, f"name={name}", f"cluster.workers={workers}", *overrides)
        if runs_dir != "runs":
            self.words += (f"runs_dir={runs_dir}",)
        self.folder = cluster.desk / runs_dir / name  # an absolute `runs_dir` stands for itself
        self.log = cluster.logs / f"job-{name}.log"  # servers have logs of their own there
        self.process: Popen[bytes] | None = None

    def start(self, *more: str) -> Job:
        """Start the command, or start it again."""
        self.process = self.cluster.glann(*self.words, *more, log=self.log)
        return self

    def wait(self, seconds: float = 400) -> int:
        """The exit status of the command."""
        assert self.process is not None
        return self.process.wait(seconds)

    def check_running(self) -> bool:
        """False: what is waited for has not come, but may. Raises RuntimeError if the command has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"the run ended with {self.process.returncode}:\n{self.said()[-3000:]}")
        return False

    def said(self) -> str:
        """What the command has printed, over all its starts."""
        return self.log.read_text(errors="replace")

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return json.loads((self.folder / "tracking.json").read_text())["run_id"]

    def entries(self) -> list[dict[str, Any]]:
        """The journal so far, with `at` (line number) added; a last line still being written is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) | {"at": at} for at, line in enumerate(lines) if line.endswith(b"\n")]

    def epochs(self) -> list[dict[str, Any]]:
        """The entries of finished epochs, in the order in which they were written."""
        return [entry for entry in self.entries() if entry.get("stage") in ("glo", "imle")]

    def wait_for_epoch(self, stage: str, epoch: int, seconds: float = 180) -> dict[str, Any]:
        """The journal's entry of that epoch, as soon as it is there."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [e for e in self.epochs() if (e["stage"], e["epoch"]) == (stage, epoch)]
            return bool(found) or self.check_running()

        wait_until(
            there, seconds, f"{self.name}: no {stage} epoch {epoch} in {seconds} s:\n{self.said()[-3000:]}", 0.02
        )
        return found[-1]

    def notes(self) -> list[dict[str, Any]]:
        """What befell the run: the entries of losses, starts and phases."""
        return [entry for entry in self.entries() if entry.get("stage") == "run"]

    def wait_for_note(self, event: str, after: float, seconds: float = 120) -> dict[str, Any]:
        """The first note of that kind written after that time."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [note for note in self.notes() if note["event"] == event and note["time"] > after]
            return bool(found) or self.check_running()

        wait_until(there, seconds, f"{self.name}: no word of {event!r} in {seconds:g} s:\n{self.said()[-3000:]}", 0.02)
        return found[0]

    def wait_for_phase(self, phase: str, after: float, seconds: float = 120) -> None:
        """Until the workers have said, after that time, that they entered the phase."""

        def there() -> bool:
            entered = [note for note in self.notes() if note["event"] == "phase" and note["phase"] == phase]
            return any(note["time"] > after for note in entered) or self.check_running()

        wait_until(there, seconds, f"{self.name}: no phase {phase} in {seconds:g} s:\n{self.said()[-3000:]}", 0.02)

    def checkpoints(self) -> list[int]:
        """The serials of the complete checkpoints, oldest first."""
        with self.cluster.store(self._checkpoints) as store:
            return sorted(survey(store).good)

    def end(self) -> End:
        """What the newest checkpoint holds; every byte is checked against the manifest."""
        with self.cluster.store(self._checkpoints) as store:
            serial = max(survey(store).good)
            state = reader.load_state(store, serial)
            digest = {
                f"{group}.{name}": _hash(tensor.numpy())
                for group in reader.names(store, serial)
                for name, tensor in reader.load_tensors(store, serial, group).items()
            }
            rows = reader.load_rows(store, serial, range(state["rows"]))
        digest |= {f"latents.{name}": _hash(array) for name, array in rows.items()}
        return End(serial, digest, rows["steps"], state)

    @property
    def _checkpoints(self) -> str:
        return f"s3://{BUCKET}/runs/{self.name}/checkpoints"


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(repr((array.dtype.str, array.shape)).encode() + array.tobytes()).hexdigest()
