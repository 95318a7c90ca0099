"""A run as a sequence of worker groups: after a loss the driver starts a new group from the last checkpoint.

A group ends because the run is done, because the driver requested it (a signal, a draining node, capacity for more
workers), in both cases with a checkpoint, or because a worker was lost. The next group uses the capacity available.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic, sleep
from types import FrameType
from typing import Any, TypeVar

from ...cluster.checkpoints.lease import HeldLease
from ...cluster.checkpoints.retention import latest
from ...cluster.nodes.capacity import PlacementReservation, release_abandoned, this_node
from ...cluster.nodes.ray import resources_of
from ...cluster.nodes.ray_private import draining_nodes
from ...config.run import Config
from ...errors import EnvironmentFault, ExitStatus, GlannError
from ...storage.open import open_store
from ..stage import DONE
from .control import Request
from .evaluation import EVALUATION
from .events import (
    CapacityFound,
    EpochDone,
    Event,
    Joined,
    NodeDraining,
    Phase,
    Progress,
    Resumed,
    Stopping,
    Training,
    Waiting,
    WorkersLost,
)
from .failures import CannotImport, classify_failure
from .hooks import NO_HOOKS, Hooks
from .launch import fit_workers
from .mailbox import Mailbox
from .state import Position

T = TypeVar("T")
POLL_S = 0.2
END_S = 10.0  # for the thread of a group whose workers were ended
WATCH_S = 2.0  # between checks for draining and new nodes
RELEASE_S = 5.0  # in which Ray notices that the controller of a group has ended
SETTLE_S = 3.0  # an elastic run starts once capacity has not grown for so long; Ray retries placement every second
PAUSES_S = (0.0, 2.0, 10.0, 30.0, 60.0)  # before a retry, by the number of failures in a row without progress
ANSWER_S = 10.0
RESUMES = "the same command resumes from the last checkpoint"
MEASURES = "the same command measures it"


class RunStopped(GlannError):
    """The run was stopped on request, is saved, and can be resumed."""

    exit_status = ExitStatus.STOPPED


def run_workers(config: Config, on_event: Callable[[Event], None], lease: HeldLease, hooks: Hooks = NO_HOOKS) -> None:
    """Train and evaluate on groups of workers until the run is done, passing every event to `on_event`.

    Raises:
        UserError, or the error of a bug: not retried. Also if another command works on the run.
        EnvironmentFault: more than `cluster.max_failures` losses without a checkpoint in between, or no capacity.
        RunStopped: after SIGINT or SIGTERM, if `hooks.stop` returned a reason, or if nodes were drained and there is
            no other capacity.
    """
    groups = Groups(config, on_event, lease, hooks.stop)
    try:
        with stop_on_signal(groups.stop):
            while not groups.run_one():
                pass
    except Exception:
        if groups.fit is not None and not groups.training:
            release_after_failed_start()
        raise


def release_after_failed_start() -> None:
    """Give up what a group reserved that ended before it trained, as soon as Ray has noticed its end."""
    import ray

    deadline = monotonic() + RELEASE_S
    while ray.is_initialized() and not release_abandoned() and monotonic() < deadline:
        sleep(POLL_S)


class Groups:
    """The successive groups of workers of a run, and the driver's request to the current one."""

    def __init__(
        self,
        config: Config,
        on_event: Callable[[Event], None],
        lease: HeldLease,
        stop_reason: Callable[[], str] = NO_HOOKS.stop,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.config, self.on_event, self.lease, self.stop_reason = config, on_event, lease, stop_reason
        self.store = open_store(config.checkpoint_url, config.s3)
        self.here = this_node()
        # On the driver's node: reachable as long as the driver is.
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mailbox)
        self.mailbox: Any = actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(self.here, soft=False)
        ).remote()
        self.fit: Future[bool] | None = None
        self.number = self.failures = self.workers = 0
        self.saved = -1  # serial of the newest checkpoint known
        self.stopping = ""  # why the run ends, if it is ending
        self.why = ""  # why the current group was started, if it is not the first
        self.trained_at: float | None = None
        self.begin()

    def begin(self) -> None:
        """Reset the state of a group for the next one."""
        self.number += 1
        self.nodes: set[str] = set()
        self.position: Position | None = None
        self.training = self.evaluating = False
        self.request, self.reason = Request.NOTHING, ""

    def stop(self, why: str = "the run was stopped") -> None:
        """Request a checkpoint and the end of the run."""
        self.stopping = why
        self.on_event(Stopping())

    def poll_stop(self) -> None:
        """Stop if `hooks.stop` returns a reason."""
        if not self.stopping and (why := self.stop_reason()):
            self.stop(why)

    def run_one(self) -> bool:
        """Run one group until it ends; True if the run is done, False if another group must follow."""
        self.refresh_latest_checkpoint()
        self.workers = self.reserve()
        self.begin()
        self.fit = in_background(
            lambda: fit_workers(self.config, self.workers, self.mailbox, self.number, self.lease.ticket)
        )
        try:
            self.watch(self.fit)
        except BaseException:
            self.end_workers()
            with suppress(Exception):
                self.fit.exception(END_S)
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
        """Wait for the capacity for a group; returns its number of workers."""
        cluster = self.config.cluster
        began = changed = monotonic()
        cleared = began - WATCH_S  # a group that failed at its start may have left its places reserved
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
                    raise RunStopped(f"{self.stopping}; {self.resumes()}")
                if now - began > cluster.start_timeout_s:
                    raise self.no_capacity(ready)
                if now - cleared >= WATCH_S:
                    cleared = now
                    release_abandoned()
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
        if self.why and self.saved > 0:
            return RunStopped(f"{self.why}, and {found}: there is no other capacity; {RESUMES}")
        before = f"{self.why}, and " if self.why else ""
        return EnvironmentFault(f"{before}{found}; add nodes, or lower cluster.workers or the resources of a worker")

    # While a group runs ----------------------------------------------------------------------

    def watch(self, fit: Future[bool]) -> None:
        """Exchange events and requests with the group until it ends."""
        from ray.exceptions import RayError

        done = threading.Event()
        fit.add_done_callback(lambda _: done.set())
        checked = monotonic()
        with ExitStack() as held:
            wanted: PlacementReservation | None = None
            while not fit.done():
                if self.nodes and wanted is None:  # not earlier: it would reserve the places of the starting group
                    wanted = held.enter_context(places(self.config, self.config.cluster.max_workers - self.workers))
                if wanted is not None and monotonic() - checked >= WATCH_S:
                    checked = monotonic()
                    with suppress(RayError):  # the head node is busy or unreachable: retry at the next check
                        self.check_nodes(wanted)
                self.poll_stop()
                if self.stopping:
                    self.request = Request.STOP
                self.lease.check()
                self.exchange()
                done.wait(POLL_S)
        self.exchange()

    def check_nodes(self, wanted: PlacementReservation) -> None:
        """Request a stop if a node of the run drains, or a move if there is capacity for more workers."""
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
        except ray.exceptions.RayError:  # Ray restarts the actor; only its queued messages are lost
            return
        for message in messages:
            if message.group != self.number:
                continue  # a late message of a past group
            match message.event:
                case Joined(node):
                    self.nodes.add(node)
                case Resumed(position):
                    self.position = position
                    if position.stage == DONE:
                        self.note_training()  # no step follows that would report it
                case event:
                    if isinstance(event, Progress | EpochDone):
                        self.note_training()
                    self.evaluating |= event == Phase(EVALUATION)
                    self.on_event(event)

    def note_training(self) -> None:
        """Record the time of a step, and report the first step of a group."""
        now = monotonic()
        if not self.training:
            again = self.trained_at is not None
            gap_s = round(now - self.trained_at, 2) if self.trained_at is not None else None
            self.on_event(Training(self.workers, self.position, self.why if again else None, gap_s))
        self.training, self.trained_at = True, now

    def end_workers(self) -> None:
        """End the group at once, or at the next step if the driver is a Ray actor and must not shut Ray down."""
        import ray

        if ray.get_runtime_context().get_actor_id() is None:
            ray.shutdown()
        else:
            self.mailbox.drain.remote(Request.STOP)

    # After a group ---------------------------------------------------------------------------

    def after_loss(self, error: BaseException) -> None:
        """Count a loss, and raise an error if it ends the run."""
        cause = classify_failure(error)
        if not isinstance(cause, EnvironmentFault) or isinstance(cause, CannotImport):
            raise cause from (error if cause is not error else None)
        if self.stopping and self.evaluating:
            raise RunStopped(f"{self.stopping} before it was measured; it is trained and saved, and {MEASURES}")
        if self.stopping:
            raise RunStopped(f"{self.stopping}, but not saved ({cause}); {self.resumes()}") from error
        self.failures = 1 if self.refresh_latest_checkpoint() else self.failures + 1
        limit = self.config.cluster.max_failures
        if 0 <= limit < self.failures:
            raise EnvironmentFault(
                f"{cause}; lost {self.failures} times without a new checkpoint, which is more than "
                f"cluster.max_failures={limit}; {self.resumes()}"
            ) from error
        self.why = str(cause)
        self.on_event(WorkersLost(self.why))
        sleep(PAUSES_S[min(self.failures, len(PAUSES_S)) - 1])

    def resumes(self) -> str:
        """What the same command will do."""
        return RESUMES if self.saved > 0 else "nothing was saved yet: the same command starts from the beginning"

    def refresh_latest_checkpoint(self) -> bool:
        """Look up the newest checkpoint; True if it is newer than before. False if the store is unreachable."""
        with suppress(EnvironmentFault):
            before, self.saved = self.saved, max(self.saved, latest(self.store) or 0)
            return self.saved > before
        return False


def in_background(function: Callable[[], T]) -> Future[T]:
    """The future result of a function that runs in a thread which nothing has to wait for.

    A thread that waits for workers usually ends with Ray, but sometimes waits for ever in Ray's own code: the command
    would not end then, nor would Python with a thread of a pool.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    return future


@contextmanager
def places(config: Config, number: int) -> Iterator[PlacementReservation]:
    """Reserve places for `number` workers while inside."""
    reservation = PlacementReservation(resources_of(config.cluster), number)
    try:
        yield reservation
    finally:
        reservation.release()


@contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first SIGINT or SIGTERM; raise KeyboardInterrupt on the second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
