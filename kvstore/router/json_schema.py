"""Words to say a JSON Schema (draft 2020-12) in.

Owns: small functions that make schemas, as plain dictionaries.
Promises: no more is said than the arguments say, but that an integer is not negative.
Leaves to others: the documents that are described (`schemas`), the operations (`operations`).
"""

from __future__ import annotations

from typing import Any

from kvstore.errors import KvError

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """The component schema of that name."""
    return {"$ref": f"#/components/schemas/{name}"}


def text(description: str = "", **more: Any) -> Schema:
    return described({"type": "string", **more}, description)


def integer(description: str = "", minimum: int = 0, **more: Any) -> Schema:
    return described({"type": "integer", "minimum": minimum, **more}, description)


def number(description: str = "", **more: Any) -> Schema:
    return described({"type": "number", **more}, description)


def array(items: Schema, description: str = "", **more: Any) -> Schema:
    return described({"type": "array", "items": items, **more}, description)


def document(description: str, required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these members."""
    return described(
        {"type": "object", "required": list(required), "properties": required | (optional or {})}, description
    )


def closed(schema: Schema) -> Schema:
    """The same object, without any other member."""
    return schema | {"additionalProperties": False}


def one_of(description: str, *schemas: Schema, **more: Any) -> Schema:
    return described({"oneOf": list(schemas), **more}, description)


def codes(errors: tuple[type[KvError], ...] | list[type[KvError]]) -> Schema:
    """One of the codes of these errors."""
    return text(enum=sorted(error.code for error in errors))


def described(schema: Schema, description: str) -> Schema:
    return schema | {"description": description} if description else schema


def having(*names: str, **constants: str) -> Schema:
    """A case of an object: these members are there, and those have these values."""
    properties = {name: {"const": value} for name, value in constants.items()}
    return {"required": [*constants, *names], "properties": properties}
