"""The `glann` command. Each subcommand imports its dependencies when it runs, so that `--help` is fast.

Exit statuses: `errors.ExitStatus`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..cluster.nodes.threads import let_threads_sleep
from ..errors import ExitStatus, GlannError, one_line, redact
from .compare import compare
from .data import data_app
from .drain import drain, leave
from .evaluate import evaluate, report
from .jobs import jobs_app, submit
from .mlflow_server import mlflow
from .paragraphs import fill_paragraphs
from .registry import registry_app
from .sample import interpolate, sample
from .streams import discard_unwritten, open_streams, print_error
from .train import doctor, recipes, show_config, train
from .tune import tune

if TYPE_CHECKING:
    from types import TracebackType

app = typer.Typer(
    name="glann",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(jobs_app, name="jobs")
app.add_typer(registry_app, name="registry")


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"glann {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="print the traceback of an error (anywhere on the line)")
    ] = False,
) -> None:
    """Train GLANN on a cluster: non-adversarial image generation with one latent code per image.

    \b
    glann train digits                          10,000 digits, two workers, no GPU
    glann train celebahq-1024 --dry-run         the estimated cost, without training
    glann sample runs/digits --out samples.png  new images from a finished run
    glann doctor celebahq-1024                  check that this cluster is ready for it
    glann submit celebahq-1024 ...              train on a remote cluster
    glann tune digits                           search for better values of a recipe
    glann compare samplers                      train and measure methods side by side
    """


app.command()(train)
app.command()(submit)
app.command()(tune)
app.command()(compare)
app.command()(sample)
app.command()(interpolate)
app.command()(evaluate)
app.command()(report)
app.command("config")(show_config)
app.command()(recipes)
app.command()(doctor)
app.command()(mlflow)
app.command()(drain)
app.command(hidden=True)(leave)
fill_paragraphs(app)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit; errors are printed to stderr in one line."""
    open_streams()
    let_threads_sleep()
    given = sys.argv[1:] if arguments is None else arguments
    show = "--traceback" in given  # at any position: it is often added to the end of a failed command
    given = [argument for argument in given if argument != "--traceback"]
    status: object = ExitStatus.OK
    try:
        try:
            app(args=given, prog_name="glann")
        except SystemExit as exit:
            status = exit.code
            if status == ExitStatus.INTERRUPTED:
                print_error("interrupted" + ("; the same command resumes the run" if given[:1] == ["train"] else ""))
        sys.stdout.flush()
    except Exception as error:
        if show:
            sys.excepthook = _traceback  # Python's own traceback, without passwords
            raise
        message, status = explain(error)
        if not isinstance(error, BrokenPipeError):  # `glann recipes | head -1` is no error
            print_error(message)
        discard_unwritten()
    sys.exit(status)  # type: ignore[arg-type]


def explain(error: Exception) -> tuple[str, int]:
    """The error line to print, and the exit status."""
    if isinstance(error, GlannError):
        return f"{'stopped' if error.exit_status == ExitStatus.STOPPED else 'error'}: {error}", error.exit_status
    if isinstance(error, OSError) and error.strerror:
        return f"error: {error.strerror}" + (f": {error.filename}" if error.filename else ""), ExitStatus.ENVIRONMENT
    what = f"unexpected {type(error).__name__}: {one_line(error, 300)}"
    return f"error: {what}; this is a bug: run the command again with --traceback and report it", ExitStatus.BUG


def _traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    import traceback

    print_error(redact("".join(traceback.format_exception(kind, error, at))))
