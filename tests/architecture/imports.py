"""Which file imports which, read from the source; nothing is run.

Every import statement counts: at the top of a file, inside a function, and under ``if TYPE_CHECKING:``, since a reader
of the file has to know of all of them.  A module that is named by a string alone (``importlib``) is not seen.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "grpo_kernels"
FOLDERS = ("grpo_kernels", "benchmarks", "experiments", "examples", "tools")
SCRIPTS = ("examples", "tools")
"""Of these, where files import each other by bare name."""

PUBLIC = "public names"
"""What the package itself offers: ``__init__.py`` of grpo_kernels, and an import of a name that it has."""

Name = tuple[str, ...]
"""A module, or a name in one: ("grpo_kernels", "backends", "choose")."""


class Import(NamedTuple):
    line: int
    bound: str
    """The name that it gives to the file."""
    name: Name
    """What that stands for."""


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> Name:
    """``grpo_kernels/backends/torch_ops.py`` → ("grpo_kernels", "backends", "torch_ops"); a script has one part."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in SCRIPTS:
        return parts[-1:]
    return parts[:-1] if parts[-1] == "__init__" else parts


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path: Path) -> list[Import]:
    """Every import of a file.  ``from . import x`` and ``from .x import y`` both name x."""
    here = path.relative_to(ROOT).parent.parts
    return [found for node in ast.walk(tree_of(path)) for found in names_in(node, here)]


def names_in(node: ast.AST, here: Name) -> Iterator[Import]:
    """The imports of one statement in a file of the package ``here``; none where it is no import."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            name = tuple(alias.name.split("."))
            yield Import(node.lineno, alias.asname or name[0], name)
    elif isinstance(node, ast.ImportFrom):
        base = here[: len(here) - node.level + 1] if node.level else ()
        base += tuple(node.module.split(".")) if node.module else ()
        for alias in node.names:
            yield Import(node.lineno, alias.asname or alias.name, (*base, alias.name))


# ---------------------------------------------------------------------------------------------- files


@functools.cache
def modules() -> dict[Name, Path]:
    return {module_of(path): path for folder in FOLDERS for path in files(folder)}


def file_of(name: Name) -> Path | None:
    """The file of the module that a name is, or is in; None for what is not of this repository."""
    known = modules()
    return next((known[name[:end]] for end in range(len(name), 0, -1) if name[:end] in known), None)


def graph_of_files() -> dict[str, set[str]]:
    """File → the files it imports, by their paths in the repository.

    That an import of ``a.b`` runs ``a/__init__.py`` first does not count: it would hold for every file of a package.
    """
    graph: dict[str, set[str]] = {}
    for path in modules().values():
        reached = {file_of(found.name) for found in imports_of(path)} - {None, path}
        graph[str(path.relative_to(ROOT))] = {str(other.relative_to(ROOT)) for other in reached if other}
    return graph


def cycles(graph: Mapping[str, AbstractSet[str]]) -> list[list[str]]:
    """The shortest way from each node back to itself, where there is one; each cycle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(graph):
        ways, seen = [[start]], {start}
        for way in ways:  # which grows: the shorter ways come first
            following = sorted(graph.get(way[-1], ()))
            if start in following:
                found.setdefault(frozenset(way), way)
                break
            ways += [[*way, other] for other in following if other not in seen]
            seen.update(following)
    return list(found.values())


# ---------------------------------------------------------------------------------------------- the package


def places(folder: Path = PACKAGE) -> list[str]:
    """The modules and subpackages right in a package's folder."""
    inside = [path.parent if path.name == "__init__.py" else path for path in folder.glob("*/__init__.py")]
    inside += [path for path in folder.glob("*.py") if not path.name.startswith("__")]
    return sorted(path.stem for path in inside)


@functools.cache
def public_names() -> frozenset[str]:
    assigned = [node for node in tree_of(PACKAGE / "__init__.py").body if isinstance(node, ast.Assign)]
    (names,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    return frozenset(ast.literal_eval(names)) | {"__version__"}


def place_of(path: Path) -> str:
    """Of a file of the package: the subpackage that it is in, or the module that it is."""
    name = module_of(path)
    return name[1] if len(name) > 1 else PUBLIC


def place_in_package(name: Name) -> str | None:
    """Of an imported name: the subpackage or module of grpo_kernels that it comes from; None for other packages."""
    if name[0] != PACKAGE.name:
        return None
    if len(name) == 1 or (name[1] in public_names() and name[1] not in places()):
        return PUBLIC
    return name[1]


def graph_of_places() -> dict[str, set[str]]:
    """Subpackage or module of the package → those it imports."""
    graph: dict[str, set[str]] = {place: set() for place in [*places(), PUBLIC]}
    for path in files(PACKAGE.name):
        place = place_of(path)
        graph[place] |= {other for found in imports_of(path) if (other := place_in_package(found.name))} - {place}
    return graph


def graph_inside(subpackage: str) -> dict[str, set[str]]:
    """File or folder right in a subpackage → those beside it that it imports."""
    folder = PACKAGE / subpackage
    graph: dict[str, set[str]] = {place: set() for place in places(folder)}
    for path in sorted(folder.rglob("*.py")):
        name = module_of(path)[2:]
        if name and name[0] in graph:
            reached = {found.name[2] for found in imports_of(path) if found.name[:2] == (PACKAGE.name, subpackage)
                       and len(found.name) > 2}  # fmt: skip
            graph[name[0]] |= reached & set(graph) - {name[0]}
    return graph


def in_order(names: Sequence[str], before: Mapping[str, AbstractSet[str]]) -> list[str]:
    """The names, each after those of ``before`` that it has; where several may come, the first of them as given.

    Of a cycle the first as given comes first.
    """
    left, found = list(names), []
    while left:
        found.append(next((name for name in left if not before[name] & set(left) - {name}), left[0]))
        left.remove(found[-1])
    return found


# ---------------------------------------------------------------------------------------------- what hides a submodule


def packages() -> dict[Name, list[str]]:
    """Every package of grpo_kernels, and its submodules."""
    return {module_of(path): places(path.parent) for path in files(PACKAGE.name) if path.name == "__init__.py"}


def hidden(package: Name, source: str, submodules: AbstractSet[str]) -> set[str]:
    """The submodules whose names the ``__init__`` of a package gives to something else."""
    return {
        bound for bound, name in _bound(ast.parse(source).body, package)
        if bound in submodules and name != (*package, bound)
    }  # fmt: skip


def _bound(statements: Sequence[ast.stmt], here: Name) -> Iterator[tuple[str, Name]]:
    """Names that statements bind at the top level of a module, and what they stand for where they were imported."""
    for node in statements:
        yield from ((found.bound, found.name) for found in names_in(node, here))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, ()
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in filter(None, targets):
            yield from ((part.id, ()) for part in ast.walk(target) if isinstance(part, ast.Name))
        for block in ("body", "orelse", "finalbody"):
            yield from _bound(getattr(node, block, []), here)
        for handler in getattr(node, "handlers", []):
            yield from _bound(handler.body, here)
