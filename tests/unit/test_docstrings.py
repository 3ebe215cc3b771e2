"""What docstrings have to say, checked: there is one for whatever others use, and it names the errors that it raises.

Read from the source with `ast`. What a table or a base says already need not be said twice: a call of a route table, an
error's title, a method of an interface.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import kvstore.errors

PACKAGE = Path(kvstore.errors.__file__).parent
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda)


class Source:
    """The modules of a package, by path below it."""

    def __init__(self, package: Path) -> None:
        self.modules = {
            str(path.relative_to(package)): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(package.rglob("*.py"))
        }
        classes = [node for tree in self.modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        self.errors = _kinds_of(classes, {"KvError"})
        self.exceptions = _kinds_of(classes, {"KvError", "Exception"}) - {"Exception"}
        self.of_interfaces = {
            each.name
            for node in classes
            if any(ast.unparse(base).startswith("Protocol") for base in node.bases)
            for each in node.body
            if isinstance(each, FUNCTIONS) and ast.get_docstring(each)
        }

    def public(self) -> Iterator[tuple[str, ast.ClassDef | None, ast.ClassDef | Function]]:
        """Where it stands, the class that it is in, and what other modules may use."""
        for path, tree in self.modules.items():
            for node in tree.body:
                if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
                    continue
                yield f"{path}:{node.lineno} {node.name}", None, node
                for inner in node.body if isinstance(node, ast.ClassDef) else ():
                    if isinstance(inner, FUNCTIONS) and not inner.name.startswith("_"):
                        yield f"{path}:{inner.lineno} {node.name}.{inner.name}", node, inner


def _kinds_of(classes: list[ast.ClassDef], roots: set[str]) -> set[str]:
    found = set(roots)
    while more := {node.name for node in classes if any(ast.unparse(base) in found for base in node.bases)} - found:
        found |= more
    return found


def _raised(function: Function) -> set[str]:
    """The names of the exceptions that it makes and raises itself, without those that it catches."""

    def within(nodes: Iterable[ast.AST]) -> set[str]:
        found: set[str] = set()
        for node in nodes:
            if isinstance(node, SCOPES):
                continue
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                found.add(node.exc.func.id)
            elif isinstance(node, ast.Try):
                caught = {ast.unparse(handler.type) for handler in node.handlers if handler.type is not None}
                found |= within(node.body) - caught
                found |= within([*node.handlers, *node.orelse, *node.finalbody])
            else:
                found |= within(ast.iter_child_nodes(node))
        return found

    return within(function.body)


def _is_told_elsewhere(source: Source, inside: ast.ClassDef | None, node: ast.ClassDef | Function) -> bool:
    if inside is None:
        return node.name in source.errors
    return node.name in source.of_interfaces or _is_of_a_table(inside) or inside.name in source.errors


def _is_of_a_table(inside: ast.ClassDef | None) -> bool:
    """Its methods answer the calls of a route table, whose entries say all of them."""
    return inside is not None and inside.name.endswith("Routes")


def undescribed(source: Source) -> list[str]:
    """What has no docstring and should have one."""
    modules = [path for path, tree in source.modules.items() if not ast.get_docstring(tree)]
    return modules + [
        where
        for where, inside, node in source.public()
        if not ast.get_docstring(node) and not _is_told_elsewhere(source, inside, node)
    ]


def unnamed_errors(source: Source) -> list[str]:
    """Functions that raise an exception of the package, and do not say so; commands say it in their exit codes."""
    found = []
    for where, inside, node in source.public():
        if isinstance(node, ast.ClassDef) or where.startswith("cli/") or _is_of_a_table(inside):
            continue
        if not ast.get_docstring(node) and _is_told_elsewhere(source, inside, node):
            continue
        told = ast.get_docstring(node) or ""
        found += [f"{where}: {name}" for name in sorted(_raised(node) & source.exceptions) if name not in told]
    return found


def unfinished_details(source: Source) -> list[str]:
    """Details of errors that do not end as a sentence does, as far as the source shows their end."""
    found = []
    for path, tree in source.modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in source.errors:
                end = _end_of(node.args[0]) if node.args else None
                if end is not None and not end.rstrip().endswith((".", "?", "!")):
                    found.append(f"{path}:{node.lineno} {node.func.id}: …{end[-40:]}")
    return found


def _end_of(text: ast.expr) -> str | None:
    """The literal with which the text ends; None if it ends with what is known only when it runs."""
    if isinstance(text, ast.BinOp):
        return _end_of(text.right)
    if isinstance(text, ast.JoinedStr):
        return _end_of(text.values[-1])
    return text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else None


@pytest.fixture(scope="module")
def own_source() -> Source:
    return Source(PACKAGE)


def test_whatever_other_modules_use_has_a_docstring(own_source: Source) -> None:
    assert undescribed(own_source) == []


def test_a_function_names_the_errors_that_it_raises(own_source: Source) -> None:
    assert unnamed_errors(own_source) == []


def test_the_detail_of_an_error_ends_as_a_sentence_does(own_source: Source) -> None:
    assert unfinished_details(own_source) == []


# --- the checks themselves


def source_of(folder: Path, text: str) -> Source:
    (folder / "module.py").write_text(text, encoding="utf-8")
    return Source(folder)


def test_what_has_no_docstring_is_named(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        "class KvError(Exception): pass\n"
        "class Locked(KvError): pass\n"
        "class Sink(Protocol):\n    '''Takes.'''\n    def send(self):\n        '''Take.'''\n"
        "class Then:\n    def send(self): ...\n    def end(self): ...\n    def _inner(self): ...\n"
        "class KeyRoutes:\n    '''Calls.'''\n    def get(self): ...\n"
        "def act(): ...\n",
    )
    assert undescribed(source) == ["module.py", "module.py:7 Then", "module.py:9 Then.end", "module.py:14 act"]


def test_an_error_that_the_docstring_does_not_name_is_named(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        "class KvError(Exception): pass\nclass Locked(KvError): pass\nclass Died(Exception): pass\n"
        "def told():\n    '''Raises Locked.'''\n    raise Locked('it is held')\n"
        "def untold():\n    '''Take it.'''\n    if True:\n        raise Died('younger')\n"
        "    def inner():\n        raise Locked()\n    raise ValueError()\n"
        "def caught():\n    '''Try.'''\n    try:\n        raise Died()\n    except Died:\n        pass\n",
    )
    assert unnamed_errors(source) == ["module.py:7 untold: Died"]


def test_a_detail_without_a_full_stop_is_named(tmp_path: Path) -> None:
    source = source_of(
        tmp_path,
        "class KvError(Exception): pass\n"
        "KvError()\nKvError('one.')\nKvError(f'{1}')\nKvError('a' f'{1}.')\nKvError('two')\nKvError(f'{1} three')\n",
    )
    assert unfinished_details(source) == ["module.py:6 KvError: …two", "module.py:7 KvError: … three"]
