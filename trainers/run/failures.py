"""What a failed group of workers comes down to: a loss that a retry may mend, a fault of the input, or a bug."""

from __future__ import annotations

import builtins
import re
from contextlib import suppress
from typing import Any

from ...errors import EnvironmentFault, UserError, one_line

# `ValueError: what` ends the text of a traceback, which is all that Ray keeps of an error in the start of a process.
_RAISED = re.compile(r"^([A-Z]\w*)(?:: (.*))?$")


class CannotImport(EnvironmentFault):
    """Workers lack a package, or have another version of it. Not retried: every start ends there."""


def classify_failure(error: BaseException) -> Exception:
    """The cause of a failed group: an EnvironmentFault if a retry may help, else the error itself, or CannotImport.

    Peers of a lost worker fail as a consequence, so the most specific error counts, not the first.
    """
    failures = {rank: unwrapped(one) for rank, one in getattr(error, "worker_failures", {}).items()}
    raised = list(failures.values())
    if not failures:
        outer: Any = getattr(error, "controller_failure", error)
        cause = unwrapped(outer)
        if isinstance(cause, ImportError):
            return cannot_import(cause)
        return EnvironmentFault(f"the workers did not start ({last_line(cause)})") if is_transient(cause) else cause
    for specific in (
        next((one for one in raised if isinstance(one, UserError)), None),
        next((cannot_import(one) for one in raised if isinstance(one, ImportError)), None),
        next((one for one in raised if not is_transient(one)), None),
        next((one for one in raised if isinstance(one, EnvironmentFault)), None),
    ):
        if specific is not None:
            return specific
    gone = sorted(rank for rank, one in failures.items() if of_ray(one))
    if not gone:
        return EnvironmentFault(f"worker {min(failures)} failed ({last_line(raised[0])})")
    text = str(failures[gone[0]])
    if "health check has been hanging" in text:
        return EnvironmentFault(f"worker {gone[0]} does not answer")
    with_node = " with its node" if "node has died" in text or "node died" in text else ""
    return EnvironmentFault(f"worker{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))} lost{with_node}")


def is_transient(error: BaseException) -> bool:
    """Whether an error may come from the environment (lost peer, node, process, store or device) and not from a bug."""
    return isinstance(error, EnvironmentFault | RuntimeError | OSError | MemoryError) or of_ray(error)


def of_ray(error: BaseException) -> bool:
    """Whether an error was raised by Ray itself."""
    return type(error).__module__.split(".")[0] == "ray"


def unwrapped(error: Exception) -> Exception:
    """The error that was raised in another process, without those that Ray wraps around it."""
    from ray.exceptions import RayTaskError  # late: Ray reads its settings when it is imported

    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if not of_ray(error) or (found := _RAISED.match(last_line(error, whole=True))) is None:
        return error
    kind, text = getattr(builtins, found[1], None), found[2] or ""
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):  # such as UnicodeDecodeError, which is not made of a text
            return kind(text)
    return error


def cannot_import(error: ImportError) -> CannotImport:
    """The error for workers that lack what this process has."""
    return CannotImport(
        f"the workers cannot start: {one_line(error)}; install on every node, for the Python of its Ray, what is "
        "installed here (`pip install -c constraints.txt .`), and compare with `glann doctor`"
    )


def last_line(error: BaseException, whole: bool = False) -> str:
    """The last line of a remote traceback, which names the error; only its first sentence, unless `whole`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1][:300] if whole else lines[-1].split(". ")[0][:300]
