"""Command line: errors a user can do something about are one line on stderr; a bug keeps its traceback."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ._terminal import printable

EXPECTED_ERROR = 2
"""Exit code where the input was wrong, as for a wrong option; a bug exits with 1, Ctrl-C with 130."""

_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
)

# Looked up only where the module is loaded already: where it is not, the error cannot be one of its own.
_EXPECTED = {
    "video2lora.video.errors": "VideoError",
    "video2lora.adapters.errors": "AdapterError",
    "video2lora.modeling.base": "BaseModelError",
    "video2lora.modeling.checkpoint": "CheckpointError",
    "video2lora.modeling.published_file": "PublishedCheckpointError",
    "huggingface_hub.errors": "HFValidationError",
    "torch": "OutOfMemoryError",
}


class CommandError(ValueError):
    """What was asked of a command is not possible; the message says why and what to do."""


def check_is_there(name: str, what: str = "") -> None:
    """Raise `CommandError` for a path that is not there and cannot be a Hub id either."""
    try:
        there = bool(name) and Path(name).exists()
    except OSError:  # too long for a name
        there = False
    if not there and (not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name):
        raise CommandError(f"{what}{name} is not there: give a directory or a Hub id.")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--debug`, and make its expected errors and warnings one line on stderr each.

    Raises:
        typer.Exit: with code 2 after an expected error, 130 after Ctrl-C.
    """
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            with _warnings_as_lines(), _logged_as_lines():
                command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if debug or not is_expected(error):
                raise
            typer.echo(f"error: {printable(one_line(error))}", err=True)
            raise typer.Exit(EXPECTED_ERROR) from None

    # typer keeps the line breaks of all but the first paragraph
    run.__doc__ = "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), _DEBUG])  # type: ignore[attr-defined]
    return run


def is_expected(error: BaseException) -> bool:
    """Whether the user can do something about `error`, so that a traceback would only be in the way."""
    if isinstance(error, BrokenPipeError):
        return False  # typer ends quietly: the reader of our output went away
    kinds = [getattr(sys.modules[module], name) for module, name in _EXPECTED.items() if module in sys.modules]
    return isinstance(error, (CommandError, OSError, *kinds))


@contextmanager
def about(name: str) -> Iterator[None]:
    """Make errors in the body name `name`, and those of a wrong configuration (`ValueError`) expected."""
    try:
        yield
    except (OSError, ValueError) as error:
        message = one_line(error)
        if is_expected(error) and name in message:
            raise
        raise CommandError(message if name in message else f"{name}: {message}") from error


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings meant for users as `warning: ...` on stderr, and no others."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            typer.echo(f"warning: {printable(' '.join(str(message).split()))}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class _LineHandler(logging.Handler):
    """Writes a record as `warning: ...` on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{record.levelname.lower()}: {printable(' '.join(record.getMessage().split()))}", err=True)


@contextmanager
def _logged_as_lines() -> Iterator[None]:
    """Show what the library logs as a warning or worse like its other warnings."""
    logger, handler = logging.getLogger("video2lora"), _LineHandler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
