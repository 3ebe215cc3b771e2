"""The architecture, checked: floors, cycles, hidden imports, and processes that know nothing of one another.

A module imports lower floors or its own folder. The checker reads the source with `ast`, so nothing is
imported; it is itself tested on small trees that break each rule.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import kvstore.errors

PACKAGE = Path(kvstore.errors.__file__).parent

FLOORS = {
    "errors": 0, "config": 0, "addresses": 0, "environment": 0, "model": 0, "protocol": 0, "message_sizes": 0,
    "metrics": 0, "failpoints": 0, "data_file": 0, "said_once": 0, "set_aside": 0, "strict_json": 0,
    "placement": 1, "transactions": 1, "dashboard": 1,
    "storage": 1, "replication": 2, "store": 3, "transport": 3,
    "shard": 4, "router": 4, "controller": 4,
    "client": 5, "operations": 5, "txn": 5, "process": 5, "supervisor": 5, "roster": 5, "readiness": 5, "premises": 5,
    "launcher": 5, "demo": 5, "cli": 5, "__main__": 5,
}  # fmt: skip
METHODS_MAX = 20
LINES_MAX = 500
ATTRIBUTES_MAX = 15
VALUES = {"NamedTuple", "Struct", "msgspec.Struct", "Message"}
MAY_BE_LARGE = {"kvstore/client/client.py: Client"}  # one method for each call of the API: what its users look for
FIRST_LINE_WORDS_MAX = 20
SAME_FLOOR_MAY = {
    0,
    5,
}  # words may use words, and the entry points one another; all others keep to their folder
HIDDEN_IMPORTS_ALLOWED = {
    ("cli", "rich"),  # drawing is slow to import, and most commands never draw
    ("cli", "importlib"),  # so is looking for the installed version
    ("__main__", "kvstore"),  # Ctrl-C may come while the rest is loaded
}


class Import(NamedTuple):
    importer: str
    line: int
    target: str
    hidden: bool  # inside a function


def module_files(package: Path) -> dict[str, Path]:
    """Dotted module names, the package's own first: {"kvstore.placement.ring": path, …}."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """Every import statement; `from package import module` names the module. Relative ones are resolved."""
    inside = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, hidden: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(module, node.lineno, alias.name, hidden) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(module, node.lineno, name if name in modules else base, hidden)
        hidden = hidden or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, hidden)

    return visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)


def part_of(module: str) -> str:
    """The file or folder right below the package: "kvstore.placement.ring" is of "placement"."""
    return module.split(".")[1] if "." in module else ""


def floor_broken(found: Import, package: str) -> str | None:
    """Why this import may not be, or None."""
    above, below = part_of(found.importer), part_of(found.target)
    if found.hidden and (above, found.target.split(".")[0]) not in HIDDEN_IMPORTS_ALLOWED:
        return f"the import of {found.target} is hidden in a function"
    if found.target.split(".")[0] != package or not below or above == below:
        return None
    if not above:
        return f"the package itself imports {found.target}: then every module does"
    if unknown := [part for part in (above, below) if part not in FLOORS]:
        return f"{unknown[0]} has no floor: give it one in this test"
    if FLOORS[below] < FLOORS[above] or (FLOORS[below] == FLOORS[above] and FLOORS[below] in SAME_FLOOR_MAY):
        return None
    return f"{above} (floor {FLOORS[above]}) imports {below} (floor {FLOORS[below]})"


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One import cycle, its first module repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if cycle := visit(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def violations(package: Path) -> list[str]:
    """All that breaks the rules, one sentence each, with file and line."""
    modules = module_files(package)
    found = [each for module, path in modules.items() for each in imports_of(module, path, modules)]
    said = []
    for each in found:
        if why := floor_broken(each, package.name):
            said.append(f"{modules[each.importer].relative_to(package)}:{each.line}: {why}")
    graph: dict[str, set[str]] = {}
    for each in found:
        if each.target in modules:
            graph.setdefault(each.importer, set()).add(each.target)
    if cycle := cycle_in(graph):
        said.append("import cycle: " + " -> ".join(cycle))
    return said


def test_the_floors_hold() -> None:
    assert violations(PACKAGE) == []


def test_storage_knows_rows_and_records_and_no_rule() -> None:
    modules = module_files(PACKAGE)
    imports = [each for module, path in modules.items() for each in imports_of(module, path, modules)]
    inside = [each.target for each in imports if part_of(each.importer) == "storage" and each.target in modules]
    assert {part_of(target) for target in inside} <= {"storage", "errors", "data_file"}


def test_no_class_has_grown_too_large() -> None:
    """Values with fields have no such bound."""
    large = []
    for root in (PACKAGE, PACKAGE.parent / "loadtest"):
        for path in sorted(root.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ClassDef) or VALUES & {ast.unparse(base) for base in node.bases}:
                    continue
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
                attributes = {
                    each.attr
                    for each in ast.walk(node)
                    if isinstance(each, ast.Attribute)
                    and isinstance(each.ctx, ast.Store)
                    and isinstance(each.value, ast.Name)
                    and each.value.id == "self"
                }
                if len(methods) > METHODS_MAX or len(attributes) > ATTRIBUTES_MAX:
                    large.append(f"{path.relative_to(root.parent)}: {node.name}")
    assert set(large) <= MAY_BE_LARGE


def test_no_file_has_grown_too_long() -> None:
    files = [path for folder in (PACKAGE, PACKAGE.parent / "loadtest") for path in sorted(folder.rglob("*.py"))]
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lines) > 300
    assert {path: count for path, count in lines.items() if count > LINES_MAX} == {}


def test_every_part_of_the_package_has_a_floor() -> None:
    parts = {part_of(module) for module in module_files(PACKAGE)} - {""}
    assert parts <= FLOORS.keys()


def test_the_first_line_of_a_docstring_has_at_most_20_words() -> None:
    found = []
    for path in (each for folder in (PACKAGE, PACKAGE.parent / "loadtest") for each in sorted(folder.rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").partition("\n")[0].split()
                if len(words) > FIRST_LINE_WORDS_MAX:
                    found.append(f"{path}:{getattr(node, 'lineno', 1)}: {len(words)} words: {' '.join(words)}")
    assert found == []


# --- the checker itself


def tree(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "kvstore"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


def test_a_tree_that_keeps_to_the_floors_passes(tmp_path: Path) -> None:
    package = tree(
        tmp_path,
        {
            "__init__.py": "",
            "errors.py": "import json",
            "config.py": "from kvstore.errors import KvError",
            "placement/ring.py": "from xxhash import xxh3_64_intdigest",
            "placement/map.py": "from kvstore.placement import ring\nfrom .ring import place",
            "shard/app.py": "from kvstore import errors\nfrom kvstore.placement.ring import place",
            "cli.py": "import kvstore.shard.app\ndef draw():\n    from rich.table import Table",
            "__main__.py": "from kvstore.cli import main",
        },
    )
    assert violations(package) == []


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("placement/ring.py", "from kvstore.storage import engine", "placement (floor 1) imports storage (floor 1)"),
        ("placement/ring.py", "from ..storage.engine import Engine", "placement (floor 1) imports storage"),
        ("placement/ring.py", "import kvstore.transactions.locks", "placement (floor 1) imports transactions"),
        ("errors.py", "if True:\n    import kvstore.cli", "errors (floor 0) imports cli (floor 5)"),
        ("shard/app.py", "from kvstore.router import app", "shard (floor 4) imports router (floor 4)"),
        ("router/app.py", "from kvstore import controller", "router (floor 4) imports controller (floor 4)"),
        ("controller/store/db.py", "from ...shard import app", "(floor 4) imports shard (floor 4)"),
        ("shard/app.py", "def run():\n    import json", "import of json is hidden in a function"),
        ("shard/app.py", "class A:\n  async def f():\n    from kvstore import errors", "errors is hidden"),
        ("shard/app.py", "def run():\n    import rich", "import of rich is hidden"),
        ("cli.py", "def run():\n    import kvstore.client", "kvstore.client is hidden"),
        ("__init__.py", "from kvstore.errors import KvError", "the package itself imports kvstore.errors"),
        ("cli.py", "import kvstore.helpers", "helpers has no floor"),
    ],
)  # fmt: skip
def test_an_import_that_breaks_a_rule_is_named(tmp_path: Path, name: str, source: str, said: str) -> None:
    empty = ["errors.py", "cli.py", "client.py", "helpers.py", "storage/engine.py", "transactions/locks.py"]
    folders = ["", "placement/", "shard/", "router/", "controller/", "storage/", "transactions/"]
    files = dict.fromkeys([*empty, *(f"{folder}{file}.py" for folder in folders for file in ("__init__", "app"))], "")
    files[name] = source
    found = violations(tree(tmp_path, files))
    assert len(found) == 1
    assert said in found[0]
    assert found[0].startswith(f"{name}:{source.count(chr(10)) + 1}: ")


def test_a_cycle_within_one_folder_is_named(tmp_path: Path) -> None:
    package = tree(
        tmp_path,
        {
            "placement/ring.py": "from kvstore.placement.moves import Move",
            "placement/moves.py": "from kvstore.placement import map",
            "placement/map.py": "from .ring import place",
        },
    )
    cycle = ["map", "ring", "moves", "map"]
    assert violations(package) == ["import cycle: " + " -> ".join(f"kvstore.placement.{name}" for name in cycle)]
