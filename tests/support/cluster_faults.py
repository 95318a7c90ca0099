"""Faults, the moments at which they strike, and how long a job takes to train again.

A moment is found from what the product itself shows: the journal's epochs and phases, and the requests that reach S3.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster_job import GLO_EPOCHS, IMLE_EPOCHS, Job
from cluster_nodes import HEAD, WORKERS, Cluster
from netns import wait_until

SEED = int(os.environ.get("GLANN_FAULT_SEED", "3"))
TRAINER, SHARD = "RayTrainWorker", "LatentShard"
FILLER = "filler"
SAVE_HELD_S = 3.0  # how long a checkpoint is kept from its end so that a fault can strike within it


@dataclass
class Strike:
    """One fault: what, in which phase, when (seconds since 1970), and the seconds until a new step was taken."""

    fault: str
    phase: str
    place: str
    at: float
    back_s: float | None = None

    def __str__(self) -> str:
        back = "never interrupted" if self.back_s is None else f"first new step after {self.back_s:.1f} s"
        return f"{self.fault}, {self.phase} ({self.place}): {back}"


class Missed(RuntimeError):
    """The job was past the phase, or ended: the fault has not struck."""


@dataclass
class Script:
    """Strikes at seeded random moments of one job. `name` and the seed fix every choice."""

    job: Job
    seed: int = SEED
    strikes: list[Strike] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed} {self.job.name}")

    @property
    def cluster(self) -> Cluster:
        return self.job.cluster

    def strike(self, fault: str, phase: str, act: Callable[[], Any]) -> Strike:
        """Wait for a random moment of the phase, act, and note it. Raises Missed if there is none left."""
        try:
            place = (MOMENTS | AFTER_TRAINING)[phase](self)
        except (RuntimeError, TimeoutError) as error:
            raise Missed(f"{fault} found no moment of {phase}: {error}") from error
        at = time.time()
        act()
        self.strikes.append(Strike(fault, phase, place, at))
        return self.strikes[-1]

    def training_again(self, strike: Strike, seconds: float = 180) -> None:
        """Wait until the job has taken a step after the strike, and note how long that took."""

        def back() -> bool:
            return any(entry["time"] > strike.at for entry in starts(self.job)) or self.job.check_running()

        wait_until(back, seconds, f"no new step {seconds:g} s after {strike.fault}:\n{self.job.said()[-3000:]}")
        strike.back_s = next(entry["time"] for entry in starts(self.job) if entry["time"] > strike.at) - strike.at

    def uniform(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    # Who is hit ------------------------------------------------------------------------------

    def node(self) -> str:
        """A node with a training worker. Raises Missed if the job has ended."""
        try:
            return self.random.choice(training_nodes(self.job))
        except RuntimeError as error:
            raise Missed(f"no node trains: {error}") from error

    def kill_process(self, title: str) -> None:
        """SIGKILL to the process of that title on one of the training nodes."""
        found: list[int] = []

        def some() -> bool:
            found[:] = self.cluster.processes(self.node(), f"ray::{title}")
            return bool(found)

        wait_until(some, 30, f"no {title} runs on any node", 0.02)
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The training workers of all nodes are stopped (SIGSTOP), and continue at the end."""
        found = [pid for node in WORKERS for pid in self.cluster.processes(node, f"ray::{TRAINER}")]
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def kill_driver(self) -> None:
        """SIGKILL to the command."""
        assert self.job.process is not None
        for pid in self.cluster.processes(HEAD, "\0-m\0glann\0train"):
            os.kill(pid, signal.SIGKILL)
        self.job.process.wait(30)


def training_nodes(job: Job) -> list[str]:
    """The nodes that hold a training worker of the job, which is the only one."""
    found: list[str] = []

    def some() -> bool:
        found[:] = [node for node in WORKERS if job.cluster.processes(node, f"ray::{SHARD}")]
        return bool(found) or job.check_running()

    wait_until(some, 240, "no node has a training worker")
    return found


def starts(job: Job) -> list[dict[str, Any]]:
    """The journal's notes of first steps: of the run, after a loss, and of a command that goes on."""
    return [entry for entry in job.notes() if entry["event"] in ("started", "restarted", "resumed")]


# Disks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size, which the nodes see too."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no room on it, until its file `FILLER` is removed."""
    with open(disk / FILLER, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


# Moments -------------------------------------------------------------------------------------


def in_glo(script: Script) -> str:
    """Somewhere within an epoch of stage 1."""
    epoch = _some_epoch(script, "glo", GLO_EPOCHS)
    entry = script.job.wait_for_epoch("glo", epoch)
    later = script.uniform(0, 0.8 * entry["seconds"])
    time.sleep(later)
    return f"{later:.2f} s into epoch {epoch + 1}"


def between(script: Script) -> str:
    """Stage 1 has told its last epoch and stage 2 has not begun."""
    script.job.wait_for_epoch("glo", GLO_EPOCHS)
    later = script.uniform(0, 0.3)
    time.sleep(later)
    return f"{later:.2f} s after the last epoch of stage 1"


def in_search(script: Script) -> str:
    """Within a search for nearest neighbours."""
    return _in_stage_two(script, "search")


def in_updates(script: Script) -> str:
    """Within the updates of the mapping."""
    return _in_stage_two(script, "imle")


def in_save(script: Script) -> str:
    """A worker has begun to write a checkpoint; S3 holds back a part of it, so that it cannot be complete."""
    proxy = script.cluster.proxy
    run = f"/{script.job.name}/checkpoints/step-"

    def part(method: str, path: str) -> bool:
        return method == "PUT" and run in path and "latents" in path

    in_glo(script)
    held = proxy.inject("stall", 1, SAVE_HELD_S, part)
    wait_until(lambda: held.times == 0 or script.job.check_running(), 120, "no checkpoint was begun", 0.01)
    later = script.uniform(0, 0.8 * SAVE_HELD_S)
    time.sleep(later)
    return f"{later:.2f} s into a checkpoint"


def _in_stage_two(script: Script, phase: str) -> str:
    epoch = _some_epoch(script, "imle", IMLE_EPOCHS)
    before = script.job.wait_for_epoch("imle", epoch)
    took = before["search_seconds"] if phase == "search" else before["seconds"] - before["search_seconds"]
    script.job.wait_for_phase(phase, before["time"] - 0.5)
    later = script.uniform(0, 0.6 * took)
    time.sleep(later)
    return f"{later:.2f} s into epoch {epoch + 1}"


def _some_epoch(script: Script, stage: str, epochs: int) -> int:
    """An epoch that is not done yet, and leaves others for strikes to come."""
    first = 1 + max((entry["epoch"] for entry in script.job.epochs() if entry["stage"] == stage), default=0)
    if first >= epochs:
        raise RuntimeError(f"{script.job.name} was too quick: no epoch of {stage} is left to strike in")
    return script.random.randint(first, max(first, epochs - 3))


def in_evaluation(script: Script) -> str:
    """The workers measure the trained run."""
    trained = script.job.wait_for_epoch("imle", IMLE_EPOCHS)
    script.job.wait_for_phase("evaluation", trained["time"] - 0.5)
    later = script.uniform(0, 1.0)
    time.sleep(later)
    return f"{later:.2f} s into the evaluation"


AFTER_TRAINING: dict[str, Callable[[Script], str]] = {"evaluation": in_evaluation}  # no step follows
MOMENTS: dict[str, Callable[[Script], str]] = {  # in the order of a run
    "GLO": in_glo,
    "checkpoint": in_save,
    "between the stages": between,
    "neighbour search": in_search,
    "IMLE updates": in_updates,
}
