"""What a package declares, read from its source: names, parameters, bodies. Imports nothing of it.

`module:Class.method` is followed through re-exports and base classes by `ast`, in whatever folder
holds the package: the one that is installed, or a release that is not.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Declared:
    """Where a name is declared: a module, a class, a function or another statement of `module`."""

    module: str
    node: ast.AST


@dataclass(slots=True)
class Scope:
    """Names of one module or class, and the modules that it imports whole with `*`."""

    names: dict[str, ast.stmt] = field(default_factory=dict)
    stars: list[ast.ImportFrom] = field(default_factory=list)


class Packages:
    """Top-level packages by name, each in its folder; what lies in no folder is taken as it is."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)
        self._modules: dict[str, ast.Module | None] = {}
        self._scopes: dict[int, Scope] = {}

    @classmethod
    def installed(cls, *names: str, **elsewhere: Path) -> Packages:
        """Those of this environment, and others. Finding a top-level package does not import it."""
        specs = {name: find_spec(name) for name in names if name not in elsewhere}
        found = {name: Path(spec.submodule_search_locations[0]) for name, spec in specs.items()
                 if spec and spec.submodule_search_locations}  # fmt: skip
        return cls(found | elsewhere)

    def find(self, place: str) -> Declared | None:
        """`module:attribute.attribute`, or `module` alone; None where it is not declared."""
        module, _, path = place.partition(":")
        tree = self._module(module)
        found = None if tree is None else Declared(module, tree)
        for name in filter(None, path.split(".")):
            found = self._member(found, name) if found else None
        return found

    def source(self, found: Declared) -> str:
        """The text of a declaration without its indentation, empty lines and comments."""
        first, last = getattr(found.node, "lineno", 1), getattr(found.node, "end_lineno", None)
        lines = self._file(found.module).read_text("utf-8").splitlines()[first - 1 : last]
        return "\n".join(s for line in lines if (s := line.strip()) and not s.startswith("#"))

    def _member(self, owner: Declared, name: str) -> Declared | None:
        if isinstance(owner.node, ast.Module):
            return self._global(owner.module, name, frozenset())
        if isinstance(owner.node, ast.ClassDef):
            return self._attribute(owner.module, owner.node, name)
        return None

    def _global(self, module: str, name: str, seen: frozenset[str]) -> Declared | None:
        tree = self._module(module)
        if tree is None or module in seen:
            return None
        seen |= {module}
        scope = self._scope(tree)
        if (node := scope.names.get(name)) is not None:
            return self._followed(module, node, name, seen)
        for star in scope.stars:
            if found := self._global(self._absolute(module, star), name, seen):
                return found
        return self.find(f"{module}.{name}")

    def _followed(
        self, module: str, node: ast.stmt, name: str, seen: frozenset[str]
    ) -> Declared | None:
        """An import, followed to what it names; everything else is itself."""
        if not isinstance(node, ast.ImportFrom):
            return Declared(module, node)
        source = self._absolute(module, node)
        if source.partition(".")[0] not in self._folders:
            return Declared(module, node)
        asked = next(a.name for a in node.names if (a.asname or a.name) == name)
        # a package that imports its own submodule finds itself first
        return self._global(source, asked, seen - {source} if source != module else seen) or (
            self.find(f"{source}.{asked}")
        )

    def _attribute(self, module: str, owner: ast.ClassDef, name: str) -> Declared | None:
        if (node := self._scope(owner).names.get(name)) is not None:
            return Declared(module, node)
        for base in owner.bases:
            named = base.value if isinstance(base, ast.Subscript) else base
            parent = self.find(f"{module}:{ast.unparse(named)}")
            inherited = self._member(parent, name) if parent else None
            if inherited is not None:
                return inherited
        return None

    def _scope(self, owner: ast.Module | ast.ClassDef) -> Scope:
        if id(owner) not in self._scopes:
            self._scopes[id(owner)] = scope = Scope()
            for node in _statements(owner.body):
                if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                    scope.stars.append(node)
                for name in _bound(node):
                    scope.names.setdefault(name, node)
            if isinstance(owner, ast.ClassDef):
                for name, node in _assigned_to_self(owner):
                    scope.names.setdefault(name, node)
        return self._scopes[id(owner)]

    def _module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            file = self._file(name)
            self._modules[name] = ast.parse(file.read_bytes()) if file.is_file() else None
        return self._modules[name]

    def _file(self, module: str) -> Path:
        top, *parts = module.split(".")
        folder = self._folders.get(top, Path("/nonexistent")).joinpath(*parts)
        package = folder / "__init__.py"
        return package if package.is_file() else folder.with_suffix(".py")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self._file(module).name == "__init__.py"
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + package]
        return ".".join([*parts, *filter(None, [node.module])])


def parameters(node: ast.AST) -> list[str] | None:
    """Names in the order of `inspect.signature`, `self` included; None for what takes none."""
    if not isinstance(node, Function):
        return None
    told = node.args
    named = [*told.posonlyargs, *told.args, told.vararg, *told.kwonlyargs, told.kwarg]
    return [each.arg for each in named if each is not None]


def mentioned(node: ast.AST) -> set[str]:
    """Every name, attribute, keyword and text that it uses."""
    used: set[str] = set()
    for inner in ast.walk(node):
        match inner:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                used.add(name)
            case ast.keyword(arg=str(name)) | ast.Constant(value=str(name)):
                used.add(name)
            case ast.alias(name=name):
                used.add(name.rpartition(".")[2])
    return used


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a scope, with what stands under its `if`, `try` and `with`."""
    for node in body:
        yield node
        if isinstance(node, Definition):
            continue
        for branch in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, branch, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _bound(node: ast.stmt) -> Iterator[str]:
    """Names that a statement gives its scope."""
    if isinstance(node, Definition):
        yield node.name
    elif isinstance(node, ast.Import):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        parts = (part for target in targets for part in ast.walk(target))
        yield from (part.id for part in parts if isinstance(part, ast.Name))


def _assigned_to_self(owner: ast.ClassDef) -> Iterator[tuple[str, ast.stmt]]:
    methods = (node for node in owner.body if isinstance(node, Function))
    for node in (inner for method in methods for inner in ast.walk(method)):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (part for target in targets for part in ast.walk(target)):
                if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                    yield part.attr, node
