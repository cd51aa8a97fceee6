"""Which version of the code a result comes from: digests of functions with all that they call.

A digest is of the syntax, without comments, docstrings, layout and ``extra_repr``, and the same for
all versions of Python. It covers a function or class, and, of this repository, the functions,
classes and constants that it names, theirs, and so on. So it changes when the computation may have
changed, and not when its neighbors or words have.
"""

import ast
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from reproduce.files import read

__all__ = ["UNCHANGED", "arguments", "digest", "files", "rooted", "same"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("adv", "reproduce")
# Data files have digests of their own. The tables of networks and of peers are entered only at the
# one in question, or a new one would outdate the results of all others. How a training is saved is
# no part of what is trained.
PASSED_OVER = (
    "adv.lab.checkpoints",
    "adv.lab.data",
    "adv.lab.files",
    "adv.lab.models._MODELS",
    "adv.lab.peers.PEERS",
)
ALONE = " (alone)"
UNCHANGED = ROOT / "reproduce" / "unchanged.json"
"""Edits that leave results as they were; ``reproduce.unchanged`` adds to it."""

Definition = tuple[str, str]


@dataclass
class Source:
    """A module's top-level definitions by name, and where its imported names come from."""

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)


@cache
def digest(name: str) -> str:
    """The version of a definition and of everything in this repository that it uses.

    Args:
        name: dotted, such as ``"adv.attacks.gradient.pgd"``; an entry of a dictionary is named in
            brackets, ``"adv.lab.models._MODELS[fcnn]"``. One that ends in ``" (alone)"`` means a
            definition without what it uses.

    Returns:
        12 hexadecimal digits.

    Raises:
        ValueError: there is no such definition.
    """
    texts = sorted(repr(_shape(statement)) for _, statement in _closure(name))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def same(name: str, stored: str | None, file: Path = UNCHANGED) -> bool:
    """Whether a definition's version is today's, or became it by edits that change no result.

    Args:
        name: as ``digest`` takes it.
        stored: a record's digest, or None.
        file: that vouches for such edits, in their order.
    """
    for before, after in _edits(file).get(name, ()):
        stored = after if stored == before else stored
    return stored == digest(name)


@cache
def _edits(file: Path) -> dict[str, list[list[str]]]:
    """Digests before and after each edit, by name."""
    edits: dict[str, list[list[str]]] = {}
    for change in (read(file) or {"changes": []})["changes"]:
        for name, pair in change["digests"].items():
            edits.setdefault(name, []).append(pair)
    return edits


@contextmanager
def rooted(folder: Path) -> Iterator[None]:
    """Digest the code in another folder."""
    global ROOT
    before, ROOT = ROOT, folder
    _forget()
    try:
        yield
    finally:
        ROOT = before
        _forget()


def _forget() -> None:
    for cached in (digest, _closure, _source, _edits):
        cached.cache_clear()


def arguments(name: str) -> list[str]:
    """The keyword-only arguments of a function, which is not imported for it."""
    module, _, function = name.rpartition(".")
    found = _source(module).definitions[function][0]
    return [one.arg for one in found.args.kwonlyargs] if isinstance(found, ast.FunctionDef) else []


def files(name: str) -> set[Path]:
    """The files that hold a definition and everything in this repository that it uses."""
    return {path for module, _ in _closure(name) if (path := _path(module)) is not None}


def _shape(node: object) -> object:
    """Syntax as nested tuples, the same for all versions of Python.

    Versions differ in how they print syntax (the quotes in f-strings), and in fields that are empty
    where a feature isn't used.
    """
    if isinstance(node, ast.AST):
        fields = (
            (name, _shape(value))
            for name, value in ast.iter_fields(node)
            if value not in (None, []) and name not in ("ctx", "kind", "type_comment")
        )
        return type(node).__name__, *fields
    return tuple(map(_shape, node)) if isinstance(node, list) else repr(node)


@cache
def _closure(name: str) -> tuple[tuple[str, ast.AST], ...]:
    """Module and syntax of a definition, and of all that it uses."""
    own = name.endswith(ALONE)
    name, _, entry = name.removesuffix(ALONE).partition("[")
    module, _, attribute = name.rpartition(".")
    if attribute not in _source(module).definitions:
        raise ValueError(f"no {attribute!r} in {module}")
    if own:
        return tuple((module, one) for one in _source(module).definitions[attribute])
    # Who asks for a loader of data means what it calls; a split only checks and cuts.
    passed = tuple(f"{one}.Split" if one == module else one for one in PASSED_OVER)
    found: list[tuple[str, ast.AST]] = []
    waiting = [(module, attribute)]
    if entry:
        found = [(module, _entry(module, attribute, entry.rstrip("]")))]
        waiting = list(_used(*found[0]))
    seen: set[Definition] = set()
    while waiting:
        following = waiting.pop()
        if following in seen or ".".join(following).startswith(passed):
            continue
        seen.add(following)
        for statement in _source(following[0]).definitions[following[1]]:
            found.append((following[0], statement))
            waiting += _used(following[0], statement)
    return tuple(found)


@cache
def _source(module: str) -> Source:
    path = _path(module)
    if path is None:
        raise ValueError(f"no module {module}")
    source = Source()
    for statement in _plain(ast.parse(path.read_text(encoding="utf-8"))).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            source.definitions.setdefault(statement.name, []).append(statement)
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        source.definitions.setdefault(name.id, []).append(statement)
        else:
            source.imports |= _imported(statement)
    return source


def _path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    options = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in options if path.is_file()), None)


def _plain(tree: ast.Module) -> ast.Module:
    """The tree without docstrings, and without the methods by which an object describes itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            told = [one for one in node.body if getattr(one, "name", None) == "extra_repr"]
            node.body = [one for one in node.body if one not in told]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _imported(tree: ast.AST) -> dict[str, str]:
    """The names that imports, anywhere in the tree, bind to parts of this repository."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            names |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            ours = [a for a in node.names if a.name.split(".")[0] in PACKAGES]
            for a in ours:  # "import adv.lab" binds "adv"
                package = a.name.split(".")[0]
                names[a.asname or package] = a.name if a.asname else package
    return names


def _used(module: str, tree: ast.AST) -> Iterator[Definition]:
    """The definitions of this repository that a piece of a module names."""
    source = _source(module)
    imports = source.imports | _imported(tree)
    for node in ast.walk(tree):
        chain = _chain(node)
        if not chain:
            continue
        if chain[0] in imports:
            found = _resolve(".".join([imports[chain[0]], *chain[1:]]))
            if found is not None:
                yield found
        elif chain[0] in source.definitions:
            yield module, chain[0]


def _chain(node: ast.AST) -> list[str]:
    """``a.b.c`` as a list, empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = _chain(node.value)
        return [*before, node.attr] if before else []
    return []


def _resolve(name: str) -> Definition | None:
    """The module and the definition in it that a dotted name begins with."""
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:size])
        if _path(module) is not None:
            source = _source(module)
            if parts[size] in source.definitions:
                return module, parts[size]
            if parts[size] in source.imports:  # passed on by another module
                return _resolve(source.imports[parts[size]])
            return None
    return None


def _entry(module: str, attribute: str, key: str) -> ast.expr:
    statement = _source(module).definitions[attribute][0]
    value = getattr(statement, "value", None)
    if isinstance(value, ast.Dict):
        for name, item in zip(value.keys, value.values, strict=True):
            if isinstance(name, ast.Constant) and name.value == key:
                return item
    raise ValueError(f"no entry {key!r} in {module}.{attribute}")
