"""Command line: values that a user writes as YAML, in a file or behind an equals sign, checked by name and kind."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ._errors import CommandError

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "list": (list,),
    "tuple": (list,),
    "dict": (dict,),
}


def check_keys(keys: Iterable[Any], known: Mapping[str, Any], where: str, what: str) -> None:
    """Refuse a key that is not known, with the closest one that is."""
    for key in map(str, keys):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known)[:12])}"
            raise CommandError(f"{where}: there is no {what} {key!r}; {hint}")


def checked_value(value: Any, kind: str, where: str) -> Any:
    """The value if its kind fits what the field is annotated with; what cannot be told is left to the field."""
    if value is None:
        return value
    names = [re.sub(r"\[.*", "", part).strip() for part in re.sub(r"\[[^|]*\|[^]]*\]", "", kind).split("|")]
    if any(name not in _KINDS and name != "None" for name in names):
        return value
    allowed = {kind for name in names if name != "None" for kind in _KINDS[name]}
    if type(value) not in allowed:
        wanted = " or ".join(name for name in names if name != "None")
        raise CommandError(f"{where} is {value!r}, expected {wanted}.")
    return float(value) if isinstance(value, int) and type(value) is int and "int" not in names else value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, which people expect: 1e-4 is a number, `no` and `off` are text; a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """What a text says as YAML; an error begins with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise CommandError(f"{where}: no YAML: {error}") from error
