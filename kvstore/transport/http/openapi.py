"""The OpenAPI 3.1 document of a list of routes.

Owns: the form of the document.
Promises: all that the routes say is in it, and nothing else. An error answer that several routes share is one
component, named after its codes, and after the tag if it has header fields of its own. HEAD is derived from GET.
Leaves to others: the routes, and what is said of the whole and of header fields (`About`).

Any other method or path is answered with `method-not-allowed` or `no-such-route`, components that no operation names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from itertools import groupby
from typing import Any, NamedTuple

from kvstore.config import Limits
from kvstore.errors import KvError, MethodNotAllowed, NoSuchRoute, all_errors
from kvstore.transport.http.responses import PROBLEM_JSON
from kvstore.transport.http.routes import Content, Errors, Parameter, Route, Success
from kvstore.transport.http.schema import Json, fill, schemas_of


class About(NamedTuple):
    """What is said of the whole.

    `headers`: of answers, by name: description, whether it is always there, type. `wire_names`: of those that have
    another one on the wire. `error_headers`: which of them come with an error; `example_members`: of its example.
    `problem`: the type of problem documents. `also`: types that descriptions name. `any_route`: errors that any
    route may answer.
    """

    info: Json
    tags: Mapping[str, str]
    headers: Mapping[str, tuple[str, bool, Any]]
    wire_names: Mapping[str, str]
    error_headers: Mapping[type[KvError], str]
    example_members: Mapping[type[KvError], Json]
    problem: type
    also: tuple[type, ...]
    any_route: Errors


def openapi_document(routes: Iterable[Route], about: About, limits: Limits) -> Json:
    """The document of these routes."""
    return _Writer(list(routes), about, limits).document()


def _kinds_of(route: Route) -> list[Any]:
    contents = [route.body.content] if route.body is not None else []
    contents += [content for answer in route.answers for content in (answer.content, answer.other)]
    kinds = [content.kind for content in contents if content is not None]
    return [*kinds, *(parameter.kind for parameter in route.parameters)]


class _Writer:
    def __init__(self, routes: list[Route], about: About, limits: Limits) -> None:
        self._routes = routes
        self._about = about
        self._limits = limits
        self._refusals: Json = {}
        self._parameters: Json = {}
        kinds = [kind for route in routes for kind in _kinds_of(route) if kind is not bytes]
        kinds += [about.problem, *about.also, *(kind for _, _, kind in about.headers.values())]
        schemas, self._components = schemas_of(kinds, limits)
        self._schemas = {id(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}

    def document(self) -> Json:
        about = self._about
        for error in (MethodNotAllowed, NoSuchRoute):
            self._refusals[error.code] = self._refusal((error,), (), with_body=True)
        paths: Json = {}
        for route in self._routes:
            item = paths.setdefault(route.path, {})
            item[route.method.lower()] = self._operation(route, with_bodies=True)
            if route.method == "GET":
                item["head"] = self._operation(_head_of(route), with_bodies=False)
        return {
            "openapi": "3.1.0",
            "info": about.info,
            "servers": [{"url": "/", "description": "This process."}],
            "tags": [{"name": name, "description": text} for name, text in about.tags.items()],
            "paths": paths,
            "components": {
                "schemas": self._components,
                "parameters": self._parameters,
                "headers": {
                    name: {"description": text, "required": required, "schema": self._schema(kind)}
                    for name, (text, required, kind) in about.headers.items()
                },
                "responses": self._refusals,
                "examples": {error.code: {"value": self._example(error)} for error in all_errors()},
            },
        }

    def _schema(self, kind: Any) -> Json:
        return self._schemas[id(kind)] if kind is not bytes else {"type": "string", "format": "binary"}

    def _operation(self, route: Route, *, with_bodies: bool) -> Json:
        """Its Operation object; the answers of its errors are added to the components."""
        responses = {str(answer.status): self._success(answer, with_body=with_bodies) for answer in route.answers}
        errors = sorted({*self._about.any_route, *route.errors}, key=lambda error: (error.status, error.code))
        for status, group in groupby(errors, lambda error: error.status):
            same_status = tuple(group)
            own_headers = [name for error in same_status for name in route.error_headers.get(error, ())]
            prefixes = [*([] if with_bodies else ["head"]), *([route.tag] if own_headers else [])]
            name = ".".join([*prefixes, *(error.code for error in same_status)])
            self._refusals[name] = self._refusal(same_status, own_headers, with_body=with_bodies)
            responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
        fields = {
            "operationId": route.id,
            "tags": [route.tag],
            "summary": route.summary,
            "description": fill(route.description, self._limits),
            "parameters": [self._parameter(parameter) for parameter in route.parameters],
            "requestBody": self._body(route),
            "responses": responses,
        }
        return {name: field for name, field in fields.items() if field}

    def _body(self, route: Route) -> Json | None:
        if route.body is None or route.body.content is None:
            return None
        content = self._content(route.body.content)
        if route.body.content.kind is bytes:
            content[route.body.content.media_type]["schema"]["maxLength"] = fill(
                f"{{{route.body.bytes_max}}}", self._limits
            )
        return {"required": route.body.required, "content": content}

    def _content(self, content: Content) -> Json:
        examples = {name: {"value": value} for name, value in content.examples.items()}
        return {content.media_type: {"schema": self._schema(content.kind), "examples": examples}}

    def _parameter(self, parameter: Parameter) -> Json:
        schema = dict(self._schema(parameter.kind))
        default = parameter.default(self._limits) if callable(parameter.default) else parameter.default
        rendered = {
            "name": parameter.name,
            "in": parameter.place,
            "required": parameter.required or parameter.place == "path",
            "description": fill(parameter.description, self._limits),
            "schema": schema if default in (None, "") else {**schema, "default": default},
            "examples": {name: {"value": value} for name, value in parameter.examples.items()},
        }
        if not parameter.component:
            return rendered
        self._parameters[parameter.component] = rendered
        return {"$ref": f"#/components/parameters/{parameter.component}"}

    def _success(self, answer: Success, *, with_body: bool) -> Json:
        response: Json = {"description": answer.description}
        if answer.headers:
            names = self._about.wire_names
            response["headers"] = {names.get(name, name): _header(name) for name in answer.headers}
        if answer.content and with_body:
            response["content"] = self._content(answer.content)
            response["content"] |= self._content(answer.other) if answer.other else {}
        return response

    def _refusal(self, errors: Errors, own_headers: Iterable[str], *, with_body: bool) -> Json:
        """The answer of these errors, which have their status in common; `own_headers`: of the route."""
        names = self._about.wire_names
        titles = (f"`{error.code}`: {error.title}." for error in errors)
        response: Json = {"description": f"{HTTPStatus(errors[0].status).phrase}. {' '.join(titles)}"}
        headers = [*own_headers, *(self._about.error_headers[e] for e in errors if e in self._about.error_headers)]
        if headers:
            response["headers"] = {names.get(name, name): _header(name) for name in headers}
        if with_body:
            codes = {"type": "string", "enum": sorted(error.code for error in errors)}
            narrowed = {"properties": {"code": codes, "status": {"const": errors[0].status}}}
            schema = {"allOf": [self._schema(self._about.problem), narrowed]}
            examples = {error.code: {"$ref": f"#/components/examples/{error.code}"} for error in errors}
            response["content"] = {PROBLEM_JSON: {"schema": schema, "examples": examples}}
        return response

    def _example(self, error: type[KvError]) -> Json:
        return error(**self._about.example_members.get(error, {})).problem()


def _head_of(get: Route) -> Route:
    """HEAD as it is answered: like GET, without the body."""
    return get._replace(id=f"{get.id}Head", summary=f"{get.summary}: the header fields alone")


def _header(name: str) -> Json:
    return {"$ref": f"#/components/headers/{name}"}
