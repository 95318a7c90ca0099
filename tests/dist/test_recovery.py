"""A run whose workers come and go ends as promised: no row lost, none visited twice, and it says what befell it.

Places for workers are free CPUs of the local Ray; the tests take and give them back, and kill.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from glann.cluster.checkpoints import reader, retention
from glann.cluster.checkpoints.lease import hold
from glann.config.run import validate
from glann.datasets.pack import pack
from glann.storage.open import open_store
from glann.errors import EnvironmentFault, UserError
from glann.trainers.run import recovery, worker
from glann.trainers.run.events import CheckpointStarted, EpochDone, Training, WorkersLost

ROWS, CPUS = 240, 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 28, 28), np.uint8)
    np.savez(folder / "noise.npz", images=images)
    pack(str(folder / "noise.npz"), str(folder / "packed"), resolution=28, channels=1)
    return folder / "packed"


def config(packed, tmp_path, workers, epochs, **cluster):
    return validate(
        {
            "name": "run",
            "runs_dir": str(tmp_path),
            "data": {"url": str(packed), "resolution": 28, "channels": 1},
            "generator": {"kind": "infogan", "latent_dim": 8, "width": 4},
            "loss": {"kind": "l1"},
            "glo": {"epochs": epochs, "batch_size": 12},
            "imle": {"epochs": 2, "noise_dim": 4, "batch_size": 50},
            "engine": {"zero": 1},
            "cluster": {"workers": workers} | cluster,
            "checkpoint": {"every_epochs": 4, "keep": 2},
            "preview": {"every_epochs": 1000},
        },
        "test",
    )


class Others:
    """CPUs that somebody else uses."""

    def __init__(self, ray):
        self.ray, self.taken = ray, []

    def take(self, number):
        """Have so many more, once this returns."""
        for _ in range(number):
            self.taken.append(self.ray.util.placement_group([{"CPU": 1}]))
            assert self.taken[-1].wait(30), "no CPU became free"

    def give(self):
        self.ray.util.remove_placement_group(self.taken.pop())


@pytest.fixture
def others(local_ray, monkeypatch):
    monkeypatch.setattr(recovery, "WATCH_S", 0.5)
    others = Others(local_ray)
    yield others
    while others.taken:
        others.give()


def processes(name):
    """Ids of the processes of the local Ray that run an actor class."""
    import psutil

    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if any(f"ray::{name}" in word for word in process.cmdline()[:1]):
                found.append(process.pid)
    return sorted(found)


def visits(settings):
    store = open_store(settings.checkpoint_url)
    return reader.load_rows(store, retention.latest(store), range(ROWS))["steps"]


def run(settings, events, on_event):
    def note(event):
        events.append(event)
        on_event(event)

    with hold(open_store(settings.checkpoint_url), print) as lease:
        recovery.run_workers(settings, note, lease)


def going(events):
    """First steps of the groups of workers."""
    return [event for event in events if isinstance(event, Training)]


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_workers_grow_and_shrink_and_every_row_is_visited_once_an_epoch(local_ray, others, packed, tmp_path):
    """1 -> 2 -> 3 by room that comes, at checkpoints; -> 2 by a worker that is killed and whose room is taken."""
    others.take(CPUS - 1)
    settings = config(packed, tmp_path, {"min": 1, "max": 3}, epochs=60)
    (tmp_path / "run").mkdir()
    events, killed = [], []

    def on_event(event):
        if isinstance(event, Training) and len(going(events)) < 3:
            others.give()
        elif isinstance(event, EpochDone) and len(going(events)) == 3 and not killed:
            killed.append(processes("RayTrainWorker")[-1])
            os.kill(killed[0], signal.SIGKILL)
        elif isinstance(event, WorkersLost):
            others.take(1)  # before the run looks for room again

    run(settings, events, on_event)
    assert [event.workers for event in going(events)] == [1, 2, 3, 2], [type(e).__name__ for e in events]
    assert [(event.why or "").split(" ")[0] for event in going(events)] == ["", "there", "there", "worker"]
    print("seconds from the last step to the next:", [event.gap_s for event in going(events)])
    assert (visits(settings) == 60).all()
    done = Counter((event.stage, event.epoch) for event in events if isinstance(event, EpochDone))
    assert set(done) == {("glo", n) for n in range(1, 61)} | {("imle", 1), ("imle", 2)}
    grown = [event for event in going(events) if (event.why or "").startswith("there is")]
    for event in grown:  # a checkpoint was made for it: no epoch was done twice
        before = [e for e in events[: events.index(event)] if isinstance(e, EpochDone)]
        assert event.position.epoch == max((e.epoch for e in before), default=0)


@pytest.mark.timeout(600)
@pytest.mark.matrix
def test_losses_count_only_while_nothing_is_gained(local_ray, others, packed, tmp_path):
    """With one loss allowed, a run survives two with a checkpoint between them, and not a third right after."""
    settings = config(packed, tmp_path, 1, epochs=400, max_failures=1)
    (tmp_path / "run").mkdir()
    events, saved = [], Counter()

    def on_event(event):
        group = len(going(events))
        saved[group] += isinstance(event, CheckpointStarted)
        if (group in (1, 2) and isinstance(event, CheckpointStarted) and saved[group] == 2) or (
            group == 3 and isinstance(event, Training)
        ):
            os.kill(processes("RayTrainWorker")[0], signal.SIGKILL)

    with pytest.raises(EnvironmentFault, match=r"lost 2 times without a new checkpoint.*cluster.max_failures=1"):
        run(settings, events, on_event)
    assert len(going(events)) == 3
    assert sum(isinstance(event, WorkersLost) for event in events) == 2
    assert retention.latest(open_store(settings.checkpoint_url)) > going(events)[1].position.serial


@pytest.mark.timeout(300)
def test_a_fault_of_the_input_ends_the_run_at_once_as_itself(local_ray, others, packed, tmp_path):
    settings = config(packed, tmp_path, 2, epochs=2)
    settings = settings.model_copy(
        update={"glo": settings.glo.model_copy(update={"latent_lr": 1e38, "generator_lr": 1e38})}
    )
    (tmp_path / "run").mkdir()
    events = []
    with pytest.raises(UserError, match="not finite"):
        run(settings, events, lambda event: None)
    assert not any(isinstance(event, WorkersLost) for event in events)


def failing_start(monkeypatch, error):
    """Have the workers' function raise `error` where they unpickle it: after their places are reserved."""

    class Trap:
        def __reduce__(self):
            return (exec, (f"raise {error}",))

    trap = Trap()

    def train(task):
        return trap

    train.__module__ = Trap.__module__ = "__main__"  # so that Ray sends it as it is, and not by name
    monkeypatch.setattr(worker, "train_worker", train)


@pytest.mark.timeout(300)
def test_a_bug_in_the_start_of_a_group_ends_the_run_at_once_as_itself(local_ray, others, packed, tmp_path, monkeypatch):
    failing_start(monkeypatch, "AttributeError('no attribute run')")
    settings, events = config(packed, tmp_path, CPUS, epochs=2), []
    (tmp_path / "run").mkdir()
    with pytest.raises(AttributeError, match="no attribute run"):
        run(settings, events, lambda event: None)
    assert not any(isinstance(event, WorkersLost) for event in events)


@pytest.mark.timeout(300)
def test_a_start_that_failed_leaves_no_reservation(local_ray, others, packed, tmp_path, monkeypatch):
    """The next group needs every place, also those that the failed one had reserved."""
    failing_start(monkeypatch, "OSError(5, 'the disk did not answer')")
    settings, events = config(packed, tmp_path, CPUS, epochs=2, max_failures=1, start_timeout_s=20), []
    (tmp_path / "run").mkdir()
    with pytest.raises(EnvironmentFault, match=r"the disk did not answer.*lost 2 times.*nothing was saved yet"):
        run(settings, events, lambda event: None)
    assert sum(isinstance(event, WorkersLost) for event in events) == 1


@pytest.mark.timeout(300)
def test_too_little_room_is_said_in_time(local_ray, others, packed, tmp_path):
    others.take(CPUS - 1)
    settings = config(packed, tmp_path, 2, epochs=2, start_timeout_s=3)
    events = []
    with pytest.raises(EnvironmentFault, match=r"room for 1 of 2 workers after cluster.start_timeout_s=3"):
        run(settings, events, lambda event: None)
