"""Imports between packages go downwards only: no package reaches itself, lazy and type-checking imports included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import vdr_cli

ROOT = Path(vdr_cli.__file__).parent

Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted names of the package's modules and their files."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Everything that a module imports anywhere in it, as dotted names; the last part may be an attribute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield ast.unparse(node.args[0]).lstrip("f").strip("'\"")


def package_graph(root: Path) -> Graph:
    """The imports of each package, and of each module beside the packages."""
    names = modules(root)
    graph: Graph = {}
    for name, path in names.items():
        own = package_of(name)
        for target in imported(path):
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target and package_of(target) != own:
                graph.setdefault(own, set()).add(package_of(target))
    return graph


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def in_circles(graph: Graph) -> set[str]:
    """The packages that reach themselves."""
    return {package for package in graph if package in reached(graph, package)}


def reached(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), set()) - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def test_no_package_is_in_an_import_circle() -> None:
    graph = package_graph(ROOT)
    assert len(graph) > 15
    assert in_circles(graph) == set()


def test_a_lazy_import_upwards_is_found(tmp_path: Path) -> None:
    root = tmp_path / "vdr_cli"
    for name, text in {
        "low/a.py": "def f():\n    from vdr_cli.high import b\n",
        "high/b.py": "import vdr_cli.low.a\n",
        "apart/c.py": "from vdr_cli.low.a import f\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).with_name("__init__.py").write_text("")
    (root / "__init__.py").write_text("")
    assert in_circles(package_graph(root)) == {"vdr_cli.low", "vdr_cli.high"}


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {
        package_of(name)
        for name, path in modules(ROOT).items()
        if any(target.partition(".")[0] == "deepspeed" for target in imported(path))
    }
    assert importers == {"vdr_cli.engine"}
