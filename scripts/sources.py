"""What a piece of code is made of: the modules of the package that it imports, directly or through another."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def with_imports(script: Path, root: Path = ROOT) -> set[Path]:
    """A script and every module of the package that running it may load."""
    found: set[Path] = set()
    todo = [script]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            todo += [module for name in imported(tree) for module in module_files(name, root)]
    return found


def imported(tree: ast.AST) -> list[str]:
    """Dotted names that the code imports; of `from a import b` both a and a.b, since b may be a module."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def module_files(name: str, root: Path = ROOT) -> list[Path]:
    """The files of the package that importing `name` runs: the module's own and those of the packages around it."""
    parts = name.split(".")
    if parts[0] != "gptlite":
        return []
    found = []
    for depth in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        found += [
            file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()
        ]
    return found
