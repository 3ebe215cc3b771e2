"""JSON Schemas (draft 2020-12) of the documents that calls take and give, made by msgspec from their types.

Owns: what msgspec cannot say of a type: alternatives that have no tag, members that depend on one another, limits that
are configured.
Promises: request bodies are closed where their types forbid unknown members; answers are open.
Leaves to others: the types (beside the routes that use them), the OpenAPI document (`openapi`).

In a description `{key_bytes_max:,}` becomes that limit; a text that is nothing but `{key_bytes_max}` becomes a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Meta

from kvstore.config import Limits

Json = dict[str, Any]
Kind = TypeVar("Kind", bound=type)

_TEMPLATE = "#/components/schemas/{name}"
_REFINED: dict[str, Json] = {}  # by name of a type: what its schema says besides
_ALTERNATIVES: dict[str, type] = {}  # by name: types that only a schema refers to
_PLACEHOLDER = re.compile(r"\{(\w+)(:[^}]*)?\}")
_NAMES = frozenset(Limits.__struct_fields__)


def refined(**schema: Any) -> Callable[[Kind], Kind]:
    """A class decorator: its schema says this, too."""

    def add(kind: Kind) -> Kind:
        _REFINED[kind.__name__] = schema
        return kind

    return add


def one_of(*kinds: type, **schema: Any) -> Meta:
    """Of a value that is one of these, without a tag to tell them apart by: `Annotated[Any, one_of(A, B)]`."""
    _ALTERNATIVES.update({kind.__name__: kind for kind in kinds})
    return Meta(
        extra_json_schema={"oneOf": [{"$ref": _TEMPLATE.format(name=each.__name__)} for each in kinds]} | schema
    )


def having(*names: str, **constants: Any) -> Json:
    """A case of an object: these members are there, and those have these values."""
    properties = {name: {"const": value} for name, value in constants.items()}
    return {"required": [*constants, *names], "properties": properties}


def about(description: str = "", **schema: Any) -> Meta:
    """What the schema of a type says besides: `Annotated[str, about("The id of a shard.", pattern="^s")]`."""
    return Meta(extra_json_schema={"description": description, **schema} if description else schema)


def schemas_of(kinds: Sequence[Any], limits: Limits) -> tuple[list[Json], dict[str, Json]]:
    """The schema of each type, and the components that they refer to, by name."""
    more: list[type] = []
    while True:
        schemas, components = msgspec.json.schema_components([*kinds, *more], ref_template=_TEMPLATE)
        for name in components.keys() & _REFINED.keys():
            components[name] |= _REFINED[name]
        missing = _referred_to([schemas, components]) - components.keys()
        if not missing:
            break
        more += [_ALTERNATIVES[name] for name in sorted(missing)]
    return _filled(list(schemas[: len(kinds)]), limits), _filled(components, limits)


def _referred_to(part: Any) -> set[str]:
    if isinstance(part, dict):
        found = {part["$ref"].rpartition("/")[2]} if isinstance(part.get("$ref"), str) else set()
        return found.union(*map(_referred_to, part.values()))
    return set().union(*map(_referred_to, part)) if isinstance(part, list | tuple) else set()


def _filled(part: Any, limits: Limits) -> Any:
    if isinstance(part, dict):
        return {name: _filled(value, limits) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_filled(value, limits) for value in part]
    return fill(part, limits) if isinstance(part, str) else part


def fill(text: str, limits: Limits) -> Any:
    """The text with its limits; a number if it is nothing but the name of one."""
    alone = _PLACEHOLDER.fullmatch(text)
    if alone and alone[1] in _NAMES and not alone[2]:
        return getattr(limits, alone[1])

    def value(found: re.Match[str]) -> str:
        return f"{{0{found[2] or ''}}}".format(getattr(limits, found[1])) if found[1] in _NAMES else found[0]

    return _PLACEHOLDER.sub(value, text)
