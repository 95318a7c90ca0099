"""`glann drain`: drain the Ray node of a machine before it is shut down."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ExitStatus

SPARE_S = 10.0  # of the time before EC2 reclaims a machine, kept for its shutdown after Ray

Within = Annotated[
    float,
    typer.Option(min=1, metavar="SECONDS", help="time until the node is gone; anything still running then is lost"),
]
OnSpotNotice = Annotated[
    bool, typer.Option("--on-spot-notice", help="wait for EC2's interruption notice first, and use the time it leaves")
]


def drain(within: Within = 110.0, on_spot_notice: OnSpotNotice = False) -> None:
    """Drain this machine's Ray node: the runs on it save and resume on other nodes.

    \b
    glann drain --within 600        before maintenance; a pod's preStop hook
    glann drain --on-spot-notice    in the background on a spot instance

    Runs save at their next step; a run that finds no capacity elsewhere ends with status 75. The command returns once
    nothing runs on the node any more. The exit status is 1 if something still runs when the time is up.
    """
    from ..cluster.nodes import drain as node

    reason = "glann drain"
    if on_spot_notice:
        typer.echo("waiting for EC2's interruption notice")
        within, reason = max(1.0, node.wait_for_spot_notice() - SPARE_S), "EC2 reclaims this spot instance"
    typer.echo(f"{reason}: draining this node within {within:.0f} s")
    if not node.drain(within, reason):
        typer.echo(f"something still runs on this node after {within:.0f} s", err=True)
        raise typer.Exit(ExitStatus.ENVIRONMENT)
    typer.echo("the node is drained")


def leave(within: Within = 110.0, on_spot_notice: OnSpotNotice = False) -> None:
    """Drain this machine's Ray node; deprecated name of `glann drain`."""
    typer.echo("note: `glann leave` is deprecated; use `glann drain`, which does the same", err=True)
    drain(within, on_spot_notice)
