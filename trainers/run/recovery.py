"""A run as a sequence of worker groups: what is lost is started again from the last checkpoint, in the driver.

A group ends because the run is done, because the driver requested it (a signal, a node that drains, capacity for more
workers), always with a checkpoint, or because something was lost. The next one takes the capacity that there is.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic, sleep
from typing import Any

from ...cluster.checkpoints.lease import HeldLease
from ...cluster.checkpoints.retention import latest
from ...cluster.nodes.capacity import PlacementReservation, this_node
from ...cluster.nodes.ray import resources_of
from ...cluster.nodes.ray_private import draining_nodes
from ...config.run import Config
from ...errors import EnvironmentFault, ExitStatus, GlannError, UserError
from ...storage.open import open_store
from ..stage import DONE
from .control import Request
from .events import (
    CapacityFound,
    EpochDone,
    Event,
    Joined,
    NodeDraining,
    Progress,
    Resumed,
    Stopping,
    Training,
    Waiting,
    WorkersLost,
)
from .hooks import NO_HOOKS, Hooks
from .launch import fit_workers
from .mailbox import Mailbox
from .state import Position

POLL_S = 0.2
WATCH_S = 2.0  # between looks at nodes that leave or come
SETTLE_S = 3.0  # an elastic run takes the room there is once it has not grown so long; Ray tries to place every second
PAUSES_S = (0.0, 2.0, 10.0, 30.0, 60.0)  # before another try, the longer the more often in a row nothing was gained
ANSWER_S = 10.0
RESUMES = "the same command resumes from the last checkpoint"


class RunStopped(GlannError):
    """The run was asked to stop, has been saved, and can go on."""

    exit_status = ExitStatus.STOPPED


def run_workers(config: Config, on_event: Callable[[Event], None], lease: HeldLease, hooks: Hooks = NO_HOOKS) -> None:
    """Train on groups of workers until the run is done, handing every event to `on_event`.

    Raises:
        UserError, or a bug's own error: what another try does not help, or another command has the run.
        EnvironmentFault: more than `cluster.max_failures` losses without a checkpoint in between, or never any room.
        RunStopped: after SIGINT or SIGTERM, when `hooks` say so, or since nodes were taken away and there are no
            others.
    """
    groups = Groups(config, on_event, lease, hooks.stop)
    with stop_on_signal(groups.stop):
        while not groups.run_one():
            pass


class Groups:
    """The groups of workers of a run, one after another, and what the driver requests of the present one."""

    def __init__(
        self,
        config: Config,
        on_event: Callable[[Event], None],
        lease: HeldLease,
        stop_wanted: Callable[[], str] = NO_HOOKS.stop,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.config, self.on_event, self.lease, self.stop_wanted = config, on_event, lease, stop_wanted
        self.store = open_store(config.checkpoint_url, config.s3)
        self.here = this_node()
        # On the driver's node: as long as that is there, workers can reach it.
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mailbox)
        self.mailbox: Any = actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(self.here, soft=False)
        ).remote()
        self.fit: Future[bool] | None = None
        self.number = self.failures = self.workers = 0
        self.saved = -1  # serial of the newest checkpoint known
        self.stopping = ""  # why the run is to end, once it is to
        self.why = ""  # why the present group was started, if it is not the first
        self.trained_at: float | None = None
        self.begin()

    def begin(self) -> None:
        """Reset what belongs to a group, for the next one."""
        self.number += 1
        self.nodes: set[str] = set()
        self.position: Position | None = None
        self.training = False
        self.request, self.reason = Request.NOTHING, ""

    def stop(self, why: str = "the run was stopped") -> None:
        """Request a checkpoint and the end of the run."""
        self.stopping = why
        self.on_event(Stopping())

    def poll_stop(self) -> None:
        """Stop if the hooks give a reason."""
        if not self.stopping and (why := self.stop_wanted()):
            self.stop(why)

    def run_one(self) -> bool:
        """Run one group to its end; True if the run is done, False if another group has to follow."""
        self.refresh_latest_checkpoint()
        self.workers = self.reserve()
        self.begin()
        with ThreadPoolExecutor(1, "ray-train") as pool:
            self.fit = pool.submit(fit_workers, self.config, self.workers, self.mailbox, self.number, self.lease.ticket)
            try:
                self.watch(self.fit)
            except BaseException:
                self.end_workers()  # and with them the thread that waits for them
                raise
        if (error := self.fit.exception()) is not None:
            self.after_loss(error)
            return False
        if not self.fit.result():
            return True
        if self.stopping:
            raise RunStopped(f"{self.stopping} and is saved; the same command resumes it")
        self.failures, self.why = 0, self.reason
        return False

    # Before a group --------------------------------------------------------------------------

    def reserve(self) -> int:
        """Wait until there is room for a group; how many workers it can have."""
        cluster = self.config.cluster
        began = changed = monotonic()
        ready, reported = -1, False
        with places(self.config, cluster.max_workers) as reservation:
            while True:
                now = monotonic()
                if (places_ready := reservation.ready()) != ready:
                    ready, changed = places_ready, now
                if ready == cluster.max_workers or (ready >= cluster.min_workers and now - changed >= SETTLE_S):
                    return ready
                self.poll_stop()
                if self.stopping:
                    raise RunStopped(f"{self.stopping}; {RESUMES}")
                if now - began > cluster.start_timeout_s:
                    raise self.no_capacity(ready)
                if not reported and now - began > SETTLE_S:
                    reported = True
                    self.on_event(Waiting(ready, cluster.min_workers))
                sleep(POLL_S)

    def no_capacity(self, ready: int) -> GlannError:
        """The error for a cluster that is too small."""
        cluster = self.config.cluster
        found = (
            f"the cluster has room for {ready} of {cluster.min_workers} workers after "
            f"cluster.start_timeout_s={cluster.start_timeout_s:g}"
        )
        if self.why:
            return RunStopped(f"{self.why}, and {found}: there is no other place for it; {RESUMES}")
        return EnvironmentFault(f"{found}; add nodes, or lower cluster.workers or what a worker takes")

    # While a group runs ----------------------------------------------------------------------

    def watch(self, fit: Future[bool]) -> None:
        """Exchange events and requests with the group until it ends."""
        from ray.exceptions import RayError

        done = threading.Event()
        fit.add_done_callback(lambda _: done.set())
        looked = monotonic()
        with ExitStack() as held:
            wanted: PlacementReservation | None = None
            while not fit.done():
                if self.nodes and wanted is None:  # not sooner: it would take the room of the group that is starting
                    wanted = held.enter_context(places(self.config, self.config.cluster.max_workers - self.workers))
                if wanted is not None and monotonic() - looked >= WATCH_S:
                    looked = monotonic()
                    with suppress(RayError):  # the head is busy or away: the next look counts
                        self.look_at_nodes(wanted)
                self.poll_stop()
                if self.stopping:
                    self.request = Request.STOP
                self.lease.check()
                self.exchange()
                done.wait(POLL_S)
        self.exchange()

    def look_at_nodes(self, wanted: PlacementReservation) -> None:
        """Request a checkpoint where a node of the run drains, or nodes have come."""
        draining = draining_nodes().keys() & {*self.nodes, self.here}
        if draining and self.request < Request.STOP:
            named = ", ".join(sorted(node[:12] for node in draining))
            self.request, self.reason = Request.STOP, f"node {named} is being taken away"
            self.on_event(NodeDraining(named, resumes=self.here not in draining))
            if self.here in draining:  # a driver cannot move
                self.stopping = f"the driver's node {self.here[:12]} is being taken away: the run was stopped"
        elif self.request == Request.NOTHING and (more := wanted.ready()):
            self.request, self.reason = Request.MOVE, f"there is room for {self.workers + more} workers"
            self.on_event(CapacityFound(self.workers + more))

    def exchange(self) -> None:
        """Send the request, and handle the events that the workers have sent."""
        import ray

        try:
            messages = ray.get(self.mailbox.drain.remote(self.request), timeout=ANSWER_S)
        except ray.exceptions.RayError:  # it starts again on its own; what it held is lost, and only that
            return
        for message in messages:
            if message.group != self.number:
                continue  # a late one of workers that were given up
            match message.event:
                case Joined(node):
                    self.nodes.add(node)
                case Resumed(position):
                    self.position = position
                    if position.stage == DONE:
                        self.note_training()  # there is no step left to take, and yet it has resumed
                case event:
                    if isinstance(event, Progress | EpochDone):
                        self.note_training()
                    self.on_event(event)

    def note_training(self) -> None:
        """A step was taken; the first of a group is reported."""
        now = monotonic()
        if not self.training:
            again = self.trained_at is not None
            gap_s = round(now - self.trained_at, 2) if self.trained_at is not None else None
            self.on_event(Training(self.workers, self.position, self.why if again else None, gap_s))
        self.training, self.trained_at = True, now

    def end_workers(self) -> None:
        """End the group at once; where Ray belongs to others (the driver is an actor itself), at the next step."""
        import ray

        if ray.get_runtime_context().get_actor_id() is None:
            ray.shutdown()
        else:
            self.mailbox.drain.remote(Request.STOP)

    # After a group ---------------------------------------------------------------------------

    def after_loss(self, error: BaseException) -> None:
        """Count a loss, and raise what ends the run."""
        cause = classify_failure(error)
        if not isinstance(cause, EnvironmentFault):
            raise cause
        if self.stopping:
            raise RunStopped(f"{self.stopping}, but not saved ({cause}); {RESUMES}") from error
        self.failures = 1 if self.refresh_latest_checkpoint() else self.failures + 1
        limit = self.config.cluster.max_failures
        if 0 <= limit < self.failures:
            raise EnvironmentFault(
                f"{cause}; lost {self.failures} times without a new checkpoint, which is more than "
                f"cluster.max_failures={limit}; {RESUMES}"
            ) from error
        self.why = str(cause)
        self.on_event(WorkersLost(self.why))
        sleep(PAUSES_S[min(self.failures, len(PAUSES_S)) - 1])

    def refresh_latest_checkpoint(self) -> bool:
        """Look for the newest checkpoint; whether it is newer than at the last look. A store that is away has none."""
        with suppress(EnvironmentFault):
            before, self.saved = self.saved, max(self.saved, latest(self.store) or 0)
            return self.saved > before
        return False


@contextmanager
def places(config: Config, number: int) -> Iterator[PlacementReservation]:
    """So many places for workers, wanted while inside."""
    reservation = PlacementReservation(resources_of(config.cluster), number)
    try:
        yield reservation
    finally:
        reservation.release()


def classify_failure(error: BaseException) -> Exception:
    """The error behind a failed group: an EnvironmentFault if another try may help, else the error itself.

    Peers of a lost worker fail in their turn, so the most telling error counts, not the first.
    """
    failures: dict[int, Exception] = dict(getattr(error, "worker_failures", {}))
    raised = list(failures.values())
    if not failures:
        cause: Any = getattr(error, "controller_failure", error)
        return EnvironmentFault(f"the workers did not start ({last_line(cause)})") if is_transient(cause) else cause
    for telling in (
        next((one for one in raised if isinstance(one, UserError)), None),
        next((one for one in raised if not is_transient(one)), None),
        next((one for one in raised if isinstance(one, EnvironmentFault)), None),
    ):
        if telling is not None:
            return telling
    gone = sorted(rank for rank, one in failures.items() if of_ray(one))
    if not gone:
        return EnvironmentFault(f"worker {min(failures)} failed ({last_line(raised[0])})")
    text = str(failures[gone[0]])
    if "health check has been hanging" in text:
        return EnvironmentFault(f"worker {gone[0]} does not answer")
    with_node = " with its node" if "node has died" in text or "node died" in text else ""
    return EnvironmentFault(f"worker{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))} lost{with_node}")


def is_transient(error: BaseException) -> bool:
    """Whether an error may be the environment's: a lost peer, node, process, store or device. Others are bugs."""
    return isinstance(error, EnvironmentFault | RuntimeError | OSError | MemoryError) or of_ray(error)


def of_ray(error: BaseException) -> bool:
    """Whether Ray itself says that something is gone."""
    return type(error).__module__.split(".")[0] == "ray"


def last_line(error: BaseException) -> str:
    """The line of a remote traceback that names the error, without the advice that follows its first sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(". ")[0][:300] if lines else type(error).__name__


@contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM saves and stops the run, the second ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def handle(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
