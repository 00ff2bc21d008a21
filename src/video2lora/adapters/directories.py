"""Adapters: writing a whole directory at once, so that a killed process leaves the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputExistsError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_directory(target: str | Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Give an empty directory beside `target` to write into, and put it in `target`'s place at the end.

    If the body raises, `target` is untouched and the temporary directory is removed. (A killed process leaves a
    hidden `.<name>.tmp-*` behind.)

    Args:
        target: the directory to make; its parents are made too.
        overwrite: whether an existing directory may be replaced.
        replaceable: tells whether an existing directory is of the kind that may be replaced.

    Raises:
        OutputExistsError: `target` exists and may not be replaced.
    """
    target = Path(target).expanduser().resolve()
    check_target(target, overwrite=overwrite, replaceable=replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target, "tmp")  # not tempfile's: its directories are private to the user
    temporary.mkdir()
    try:
        yield temporary
        check_target(target, overwrite=overwrite, replaceable=replaceable)  # somebody may have been faster
        if target.exists():
            _swap(temporary, target)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise `OutputExistsError` if `target` exists and may not be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"{target} exists already. Choose another directory, or pass overwrite=True.")
    if not target.is_dir():
        raise OutputExistsError(f"{target} is a file, not a directory. Choose another place.")
    if not replaceable(target):
        raise OutputExistsError(
            f"{target} holds something other than a video2lora adapter, and replacing it would delete that. "
            "Choose another directory."
        )


def _swap(temporary: Path, target: Path) -> None:
    """Exchange two directories: in one step where the system can, else in two with the old one set aside between."""
    if _exchange(temporary, target):
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Linux's atomic exchange of two paths; `False` where the system or the file system has none."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _beside(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}-{uuid.uuid4().hex[:12]}")
