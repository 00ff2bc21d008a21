"""Adapters: what can go wrong with an adapter, by what a caller would do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SHOWN = 3  # keys listed of each kind; a renamed layer can make hundreds


class AdapterError(ValueError):
    """An adapter, or what it is asked to do, is not right."""


class AdapterNotFoundError(AdapterError):
    """No adapter at this path or Hub id (or the Hub cannot be reached)."""


class ForeignAdapterError(AdapterError):
    """A PEFT adapter that video2lora did not write: load it with PEFT."""


class AdapterFormatError(AdapterError):
    """A file of the adapter is damaged, altered or from a newer version."""


class AdapterKeyError(AdapterFormatError):
    """Tensor names or shapes are not those of the adapter's target modules."""


class NonFiniteAdapterError(AdapterError):
    """A tensor holds NaN or Inf, or overflows in the dtype asked for."""


class BaseMismatchError(AdapterError):
    """The adapter was made for another base than the one at hand."""


class CompositionError(AdapterError):
    """These adapters cannot be composed."""


class OutputExistsError(AdapterError, FileExistsError):
    """The output directory exists and must not be replaced."""


def check_keys(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str) -> None:
    """Compare tensor names and shapes.

    Raises:
        AdapterKeyError: a tensor is missing, unexpected or mis-shaped; the message names it.
    """
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {_listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {_listed(unexpected)}")
    shapes = [
        f"{key} has shape {list(found[key])}, expected {list(expected[key])}"
        for key in sorted(expected.keys() & found.keys())
        if list(found[key]) != list(expected[key])
    ]
    if shapes:
        problems.append(_listed(shapes))
    if problems:
        raise AdapterKeyError(f"{where} does not hold the adapter's tensors: {'; '.join(problems)}.")


def _listed(items: Sequence[str]) -> str:
    more = f" (and {len(items) - _SHOWN} more)" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
