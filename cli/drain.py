"""`glann drain`: empty the Ray node of a machine that is about to be taken away."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ExitStatus

SPARE_S = 10.0  # kept back of the time until EC2 takes a machine, for what comes after Ray

Within = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="time until the node is gone; what still runs then is lost")
]
OnSpotNotice = Annotated[
    bool, typer.Option("--on-spot-notice", help="wait for EC2's notice first, and use the time that it gives")
]


def drain(within: Within = 110.0, on_spot_notice: OnSpotNotice = False) -> None:
    """Drain this machine's Ray node: the runs on it save and resume on other nodes.

    \b
    glann drain --within 600        before maintenance; a pod's preStop hook
    glann drain --on-spot-notice    in the background of a spot machine

    Runs save at their next step; one that finds no capacity elsewhere ends with status 75. The command returns once
    nothing runs on the node any more. The exit status is 1 if something still runs when the time is over.
    """
    from ..cluster.nodes import drain as node

    reason = "glann drain"
    if on_spot_notice:
        typer.echo("waiting for EC2's notice")
        within, reason = max(1.0, node.wait_for_spot_notice() - SPARE_S), "EC2 takes this spot machine away"
    typer.echo(f"{reason}: this node is drained within {within:.0f} s")
    if not node.drain(within, reason):
        typer.echo(f"something still runs on this node after {within:.0f} s", err=True)
        raise typer.Exit(ExitStatus.ENVIRONMENT)
    typer.echo("the node is drained")


def leave(within: Within = 110.0, on_spot_notice: OnSpotNotice = False) -> None:
    """Drain this machine's Ray node; the former name of `glann drain`."""
    typer.echo("note: `glann leave` is deprecated; use `glann drain`, which does the same", err=True)
    drain(within, on_spot_notice)
