"""`glann leave`: a node of a Ray cluster that is about to be taken away."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ExitStatus

SPARE_S = 10.0  # of the time until EC2 takes a machine, for what comes after Ray


def leave(
    within: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="until the node is gone; what still runs then is lost")
    ] = 110.0,
    on_spot_notice: Annotated[
        bool, typer.Option("--on-spot-notice", help="wait for EC2's notice first, and keep to its time")
    ] = False,
) -> None:
    """Tell Ray that the node of this machine goes away, and wait until the runs have left it.

    \b
    glann leave --within 600        before maintenance; a pod's preStop hook
    glann leave --on-spot-notice    in the background of a spot machine

    Runs save at their next step and go on elsewhere; one that finds no room ends with status 75. The exit status is 1
    if something still ran at the end of the time.
    """
    from ..cluster.nodes.drain import leave as run
    from ..cluster.nodes.drain import wait_for_spot_notice

    why = "glann leave"
    if on_spot_notice:
        typer.echo("waiting for EC2's notice")
        within, why = max(1.0, wait_for_spot_notice() - SPARE_S), "EC2 takes this spot machine away"
    typer.echo(f"{why}: this node goes away in {within:.0f} s")
    if not run(within, why):
        typer.echo(f"something still ran here after {within:.0f} s", err=True)
        raise typer.Exit(ExitStatus.ENVIRONMENT)
    typer.echo("the node was left")
