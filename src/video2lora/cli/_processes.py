"""Command line: commands that may be launched as several processes, by accelerate or torchrun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._errors import CommandError

if TYPE_CHECKING:
    from accelerate import PartialState


def process_state(device: str | None) -> PartialState:
    """This process's place in the launch, and its device.

    Raises:
        CommandError: one device was named for several processes.
    """
    from datetime import timedelta

    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))  # one may wait long for another at the end of the work
    if state.num_processes > 1 and device not in (None, "cpu"):
        raise CommandError(
            f"--device {device} with {state.num_processes} processes: each takes its own, leave it out."
        )
    return state
