"""Command line: `video2lora COMMAND`. One module a command; what is heavy is imported when a command runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from . import (
    ask,
    benchmark,
    compose,
    demo,
    env,
    evaluate,
    import_checkpoint,
    inspect,
    internalize,
    report,
    teach,
    train,
)
from ._errors import reports_errors

__all__ = ["app", "main"]

app = typer.Typer(
    name="video2lora",
    help="Turn a video into a LoRA adapter that answers questions about it without visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback, without the values of variables
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("internalize", no_args_is_help=True)(reports_errors(internalize.internalize))
app.command("ask", no_args_is_help=True)(reports_errors(ask.ask))
app.command("inspect", no_args_is_help=True)(reports_errors(inspect.inspect))
app.command("compose", no_args_is_help=True)(reports_errors(compose.compose))
app.command("import-checkpoint", no_args_is_help=True)(reports_errors(import_checkpoint.import_checkpoint))
app.command("demo")(reports_errors(demo.demo))
app.command("teach", no_args_is_help=True)(reports_errors(teach.teach))
app.command("train", no_args_is_help=True)(reports_errors(train.train))
app.command("benchmark", no_args_is_help=True)(reports_errors(benchmark.benchmark))
app.command("evaluate", no_args_is_help=True)(reports_errors(evaluate.evaluate))
app.command("report", no_args_is_help=True)(reports_errors(report.report))
app.command("env")(reports_errors(env.env))


def _print_version(wanted: bool) -> None:
    if wanted:
        from video2lora import __version__

        typer.echo(f"video2lora {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line of this process, `sys.argv`."""
    # read once, when the libraries are imported; what the user set goes first
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a line for every retry; the error says it once
    app(prog_name="video2lora")
