"""What a piece of code is made of: the modules of the package that it imports, directly or not.

And digests of it that a comment, a docstring or a formatter does not change.
"""

import ast
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def with_imports(script: Path, root: Path = ROOT) -> set[Path]:
    """A script and every module of the package that running it may load."""
    return {script} | modules(parsed(script), root)


def modules(tree: ast.AST, root: Path = ROOT) -> set[Path]:
    """Every module of the package that running the code may load, through others too."""
    found: set[Path] = set()
    todo = [tree]
    while todo:
        files = {file for name in imported(todo.pop()) for file in module_files(name, root)}
        todo += [parsed(file) for file in sorted(files - found)]
        found |= files
    return found


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> list[str]:
    """Dotted names that code imports; `from a import b` gives a.b too, as b may be a module."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def module_files(name: str, root: Path = ROOT) -> list[Path]:
    """The files that importing `name` runs: its own and those of the packages around it."""
    parts = name.split(".")
    if parts[0] != "gptlite":
        return []
    found = []
    for depth in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        candidates = (place / "__init__.py", place.with_suffix(".py"))
        found += [file for file in candidates if file.is_file()]
    return found


def digest(*contents: str | bytes) -> str:
    """A short SHA-256 of contents in order."""
    hashes = [sha256(c.encode() if isinstance(c, str) else c).hexdigest() for c in contents]
    return sha256(" ".join(hashes).encode()).hexdigest()[:16]


def meaning(tree: ast.AST) -> str:
    """A digest of what code does: no formatting, comment or docstring changes it.

    Every release of Python gives the same one; what `ast.dump` prints differs between them.
    """
    return digest(repr(_shape(tree)))


def cpp_meaning(text: str) -> str:
    """A digest of C++ without comments and without how it is laid out."""
    # a string is matched first, so that what looks like a comment in it stays
    kept = re.sub(
        r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/',
        lambda match: match[1] or " ",
        text,
        flags=re.DOTALL,
    )
    return digest(" ".join(kept.split()))


def pins(requirements: str) -> dict[str, str]:
    """The lines of requirements.txt by package, all pins of one package in one text."""
    found: dict[str, list[str]] = {}
    for line in requirements.splitlines():
        line = line.partition("#")[0].strip()
        if line:
            found.setdefault(re.split(r"[^\w.-]", line)[0], []).append(" ".join(line.split()))
    return {name: " | ".join(lines) for name, lines in found.items()}


def _shape(node: Any) -> Any:
    """Nested tuples of what means something in a syntax tree."""
    if isinstance(node, list):
        return tuple(_shape(item) for item in node if not _is_text(item))
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.JoinedStr):
        return ("JoinedStr", *_joined(node.values))
    silent = ("ctx", "kind", "type_comment", "type_ignores")
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in silent]
    # releases add fields, and leave them empty where the code is as before
    shapes = [(name, _shape(value)) for name, value in fields if value not in (None, [])]
    return (type(node).__name__, *(field for field in shapes if field[1] != ()))


def _joined(values: Iterable[ast.expr]) -> list[Any]:
    """The parts of an f-string, texts that touch each other as one."""
    parts: list[Any] = []
    for value in values:
        if not isinstance(value, ast.Constant):
            parts.append(_shape(value))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += value.value
        elif value.value:
            parts.append(value.value)
    return parts


def _is_text(node: Any) -> bool:
    """Whether a statement is a string by itself, as a docstring is."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
