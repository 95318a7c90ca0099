"""What a failed group of workers comes down to: tried again, or the user's, or a bug's, whatever its peers died of."""

from __future__ import annotations

import pickle

import pytest
from glann.errors import EnvironmentFault, UserError
from glann.trainers.run.failures import CannotImport, classify_failure
from ray.exceptions import ActorDiedError, RayActorError, RaySystemError, RayTaskError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

RESET = RuntimeError("[gloo] Connection closed by peer")


def group(*failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("text", dict(enumerate(failures)))


def lost(text: str) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError(text, failure=RayActorError())


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (group(RESET, UserError("latents are not finite")), UserError, "latents are not finite"),
        (group(RESET, TypeError("a bug")), TypeError, "a bug"),
        (group(RESET, EnvironmentFault("the disk is full")), EnvironmentFault, "^the disk is full$"),
        (group(RESET, lost("killed")), EnvironmentFault, "^worker 1 lost$"),
        (group(lost("its node has died"), RESET, lost("gone")), EnvironmentFault, "^workers 0, 2 lost"),
        (group(RESET), EnvironmentFault, "worker 0 failed .*Connection closed by peer"),
        (
            ControllerError(WorkerGroupStartupTimeoutError(2)),
            EnvironmentFault,
            r"^the workers did not start \(.*waiting for 2 workers\)$",
        ),
        (OSError(28, "No space left on device"), EnvironmentFault, "No space left"),
        (ValueError("a bug in the driver"), ValueError, "a bug in the driver"),
    ],
)
def test_the_most_telling_error_counts(error: Exception, kind: type[Exception], said: str):
    with pytest.raises(kind, match=said):
        raise classify_failure(error)


def of_a_task(cause: Exception) -> RayTaskError:
    """What `ray.get` raises for an error of a task or of a method of an actor."""
    text = f'ray::LatentShard.apply() (pid=1, ip=10.0.0.1)\n  File "x.py", line 1\n{type(cause).__name__}: {cause}'
    error = RayTaskError("apply", text, cause, proctitle="ray::x", pid=1, ip="10.0.0.1")
    dual = error.as_instanceof_cause()
    assert isinstance(dual, RayTaskError)
    return dual


def of_a_start(cause: str) -> ActorDiedError:
    """What it raises for an actor whose class or constructor fails: only the text of the error is left."""
    text = (
        "ray::RayTrainWorker.__init__() (pid=1, ip=10.0.0.1)\nRuntimeError: The actor with name RayTrainWorker failed "
        f"to import on the worker. This may be because needed library dependencies are not installed:\n\n"
        f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{cause}'
    )
    return ActorDiedError(RayTaskError("x", text, RuntimeError(text), proctitle="ray::x", pid=1, ip="10.0.0.1"))


SHADOWED = "AttributeError: module 'profile' has no attribute 'run'"


@pytest.mark.parametrize(
    "error",
    [
        group(RESET, of_a_task(AttributeError("module 'profile' has no attribute 'run'"))),
        group(of_a_start(SHADOWED), RESET),
        ControllerError(of_a_task(AttributeError("module 'profile' has no attribute 'run'"))),
        ControllerError(of_a_start(SHADOWED)),
        ControllerError(RaySystemError("x", f"Traceback (most recent call last):\n{SHADOWED}")),
        ControllerError(WorkerGroupStartupFailedError(f"failed to initialize due to error:\n{of_a_start(SHADOWED)}")),
        of_a_start(SHADOWED),
    ],
    ids=["task", "actor", "task of the controller", "actor of the controller", "argument", "start", "controller"],
)
def test_a_bug_is_a_bug_also_where_ray_wraps_it(error: Exception):
    """It would fail again after every restart, until the run says that a node was lost."""
    cause = classify_failure(error)
    assert type(cause) is AttributeError
    assert str(cause) == "module 'profile' has no attribute 'run'"


def test_an_error_of_the_user_that_ray_wraps_is_one_line():
    cause = classify_failure(group(RESET, of_a_task(UserError("latents are not finite"))))
    assert type(cause) is UserError
    assert str(cause) == "latents are not finite"


@pytest.mark.parametrize(
    "error",
    [
        group(RESET, ModuleNotFoundError("No module named 'deepspeed'")),
        group(of_a_task(ModuleNotFoundError("No module named 'deepspeed'"))),
        ControllerError(of_a_start("ModuleNotFoundError: No module named 'deepspeed'")),
    ],
)
def test_workers_without_a_package_end_the_run_at_once_with_what_to_install(error: Exception):
    """An environment's doing, and no bug; but another start would end there too."""
    cause = classify_failure(error)
    assert isinstance(cause, CannotImport)
    assert cause.exit_status == 1
    assert "No module named 'deepspeed'; install on every node" in str(cause)


@pytest.mark.parametrize(
    "error",
    [
        group(lost("its node has died")),
        group(of_a_task(RuntimeError("[gloo] Connection closed by peer"))),
        group(of_a_task(OSError(28, "No space left on device"))),
        ControllerError(of_a_start("MemoryError")),
        ControllerError(of_a_start("OSError: [Errno 24] Too many open files")),
        ControllerError(WorkerGroupStartupFailedError("One of the actors failed:\nIts node has died. KeyError: x")),
        ControllerError(RayActorError()),
    ],
)
def test_what_may_pass_is_retried_also_where_ray_wraps_it(error: Exception):
    cause = classify_failure(error)
    assert isinstance(cause, EnvironmentFault)
    assert not isinstance(cause, CannotImport)


def test_the_wrapped_errors_are_as_workers_send_them():
    """Errors travel as pickles: the cause must survive that, or the tests above show nothing."""
    sent = pickle.loads(pickle.dumps(RayTaskError("x", "text", KeyError("row"), proctitle="x", pid=1, ip="10.0.0.1")))
    assert isinstance(classify_failure(group(sent)), KeyError)
