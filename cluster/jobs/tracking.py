"""Which MLflow server a submitted job uses, and whether its runs outlive the head."""

from __future__ import annotations

import os
from typing import NamedTuple
from urllib.parse import urlsplit

from ...config.run import Config
from ...errors import redact
from ..doctor.security import is_loopback

VARIABLE = "MLFLOW_TRACKING_URI"
REMEDY = "start one by `glann mlflow STORE` (docs/cluster.md), or give tracking.uri=http://HOST:PORT"


class Tracking(NamedTuple):
    """variables: to pass to the job. server: the one it uses. warning: why its runs would be lost with the head."""

    variables: dict[str, str]
    server: str = ""
    warning: str = ""


def tracking_of(config: Config, variables: dict[str, str], on_head: str) -> Tracking:
    """The server of a job: of its configuration, of the variables it gets, of the cluster, or of this machine.

    The last one is passed by itself, unless only this machine can reach it.

    Args:
        on_head: address in the environment of jobs on the cluster's head; empty if there is none.
    """
    if not config.tracking.enabled:
        return Tracking({})
    here = os.environ.get(VARIABLE, "")
    given = config.tracking.uri or variables.get(VARIABLE) or on_head
    if not given and _travels(here):
        return Tracking({VARIABLE: here}, f"{redact(here)}, {VARIABLE} of this machine")
    if not given:
        return Tracking({}, warning=f"there is no MLflow server: runs go to a file on the head, lost with it; {REMEDY}")
    if given.startswith(("sqlite", "file:", "/")) or "://" not in given:
        return Tracking({}, warning=f"runs go to {redact(given)}, a file on the head, lost with it; {REMEDY}")
    return Tracking({}, redact(given) + (", the cluster's" if given == on_head else ""))


def _travels(uri: str) -> bool:
    """Whether an address means the same server on another machine."""
    try:
        host = urlsplit(uri).hostname
    except ValueError:
        return False
    return not uri.startswith(("sqlite", "file:")) and bool(host) and not is_loopback(host or "")
