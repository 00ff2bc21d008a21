"""Command line: the conditions of an evaluation, by name, and with options of their own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._errors import CommandError
from ._yaml import check_keys, checked_value, parse_yaml

if TYPE_CHECKING:
    from ..evaluation.conditions import Condition

_NEXT_OPTION = re.compile(r",(?=\s*\w+\s*=)")  # a text or a list may have commas too

Asked = tuple[str, dict[str, Any]]


def read_conditions(texts: Sequence[str]) -> list[Asked]:
    """Names and options out of `NAME:KEY=VALUE,KEY=VALUE`, the values as YAML and those of texts as they are.

    Raises:
        CommandError: there is no such condition or option, or the value is of another kind.
    """
    from ..evaluation.conditions import CONDITIONS

    found = []
    for text in texts:
        where = f"--condition {text}"
        name, _, rest = text.partition(":")
        check_keys([name], CONDITIONS, where, "condition")
        _, _, *parameters = inspect.signature(CONDITIONS[name]).parameters.values()  # after model and processor
        known = {parameter.name: str(parameter.annotation) for parameter in parameters}
        options: dict[str, Any] = {}
        for part in _NEXT_OPTION.split(rest) if rest else ():
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise CommandError(f"{where}: expected NAME:KEY=VALUE, such as lora_from_adapter:steps=20.")
            if not known:
                raise CommandError(f"{where}: {name} has no options.")
            check_keys([key], known, where, "option")
            if key in options:
                raise CommandError(f"{where}: {key} stands twice.")
            if not value:
                raise CommandError(f"{where}: {key} has no value; leave it out for its default.")
            if known[key] != "str":
                options[key] = checked_value(parse_yaml(value, where), known[key], f"{where}: {key}")
            else:
                options[key] = value
        found.append((name, options))
    return found


def make_conditions(asked: Sequence[Asked], model: Any, processor: Any) -> list[Condition]:
    """The conditions that `read_conditions` has read.

    Raises:
        CommandError: an option makes no sense.
    """
    from ..evaluation.conditions import CONDITIONS

    made = []
    for name, options in asked:
        try:
            made.append(CONDITIONS[name](model, processor, **options))
        except (TypeError, ValueError) as error:
            raise CommandError(f"--condition {name}: {error}") from error
    return made
