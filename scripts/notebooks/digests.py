"""What made a chapter's outputs, as a digest in its notebook: whether to execute it again.

python scripts/notebooks/digests.py [NAME ...]            say which chapters changed, and how
python scripts/notebooks/digests.py --write [NAME ...]    vouch for the outputs as they are

The parts are kept apart, so that a chapter can say what changed: its cells, the modules of the
package that they import, the C++ kernels, the records and checkpoints that it reads, and the
pinned versions of what it imports. Text, formatting, comments, docstrings and listings do not
count. `run_notebooks` stores the digest of what it executed; --write is for a change that
cannot alter an output, such as a new name.
"""

import argparse
import ast
import sys
from functools import cache
from pathlib import Path

import cells
import notebook_files
from nbformat import NotebookNode

sys.path.insert(0, str(notebook_files.ROOT / "scripts"))

import sources

# packages whose release may change an output; tqdm draws bars, and Transformers only converts
MATTER = {"torch", "numpy", "matplotlib", "safetensors", "triton", "torchao", "optuna"}
MATTER |= {"onnx", "onnxscript", "onnxruntime"}
Parts = dict[str, dict[str, str]]  # "modules": {"gptlite/model.py": "0123456789abcdef"}, ...


def made_from(notebook: NotebookNode, root: Path = notebook_files.ROOT) -> Parts:
    """The digests of all that the outputs of a notebook follow from, by part and name."""
    trees = [cells.tree(cell.source) for _, cell in cells.code(notebook) if not _is_setup(cell)]
    code = ast.Module([statement for tree in trees for statement in tree.body], [])
    files = sources.modules(code, root)
    modules = {_name(file, root): _module(file) for file in files}
    if root / "gptlite" / "kernels" / "load.py" in files:
        for file in (root / "gptlite" / "kernels").glob("*"):
            if file.suffix in (".cpp", ".h"):
                modules[_name(file, root)] = sources.cpp_meaning(file.read_text("utf-8"))
    imported = {name.partition(".")[0] for name in sources.imported(code)}
    imported |= {name.partition(".")[0] for f in files for name in _imported(f)}
    pins = sources.pins((root / "requirements.txt").read_text(encoding="utf-8"))
    return {
        "cells": {"cells": sources.meaning(_as_run(code))},
        "modules": dict(sorted(modules.items())),
        "records": {_name(file, root): _record(file) for file in records(code, files, root)},
        "versions": {name: pins[name] for name in sorted(imported & pins.keys() & MATTER)},
    }


def records(code: ast.Module, modules: set[Path], root: Path) -> list[Path]:
    """The files under assets that the code may read.

    All checkpoints and all machines' measurements where their module is imported, and the
    records of runs that are named, by file or by folder.
    """
    assets, package, found = root / "assets", root / "gptlite", set()
    if package / "checkpoints.py" in modules:
        found.update((assets / "checkpoints").glob("*.safetensors"))
    if package / "results.py" in modules:
        found.update((assets / "results").glob("*.json"))
    strings = {
        node.value.removesuffix(".json")
        for node in ast.walk(code)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for file in (assets / "results").glob("*/*.json"):
        if {file.parent.name, f"{file.parent.name}/{file.stem}"} & strings:
            found.add(file)
    return sorted(found)


def stored(notebook: NotebookNode) -> Parts | None:
    """The digests that a notebook carries, or None."""
    return notebook.metadata.get("gptlite", {}).get("made_from")


def put(notebook: NotebookNode, parts: Parts) -> None:
    """Let a notebook carry the digests of what its outputs were made from."""
    notebook.metadata["gptlite"] = {"made_from": parts}


def changes(old: Parts | None, new: Parts) -> list[str]:
    """What is not as it was, such as "gptlite/model.py changed"; empty if nothing changed."""
    if old is None:
        return ["it carries no digest of what made its outputs"]
    found = []
    for part, now in new.items():
        before = old.get(part, {})
        for name in sorted(before.keys() | now.keys()):
            if name not in before:
                found.append(f"{name} is new to it")
            elif name not in now:
                found.append(f"{name} is no longer used")
            elif before[name] != now[name]:
                found.append(f"{name} changed")
    return found


def _as_run(code: ast.Module) -> ast.Module:
    """The code without its listings, its imports apart: where they stand changes nothing."""
    imports = [
        f"{getattr(node, 'module', '')} {alias.name} {alias.asname}"
        for node in ast.walk(code)
        if _is_import(node)
        for alias in node.names
    ]
    kept = _Run().visit(ast.Module(list(code.body), []))
    return ast.Module([ast.Constant(name) for name in sorted({*imports})] + kept.body, [])


class _Run(ast.NodeTransformer):
    """Drops imports and calls of `show`."""

    def generic_visit(self, node: ast.AST) -> ast.AST | None:
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if _is_import(node) or (is_call and getattr(node.value.func, "id", "") == "show"):
            return None
        return super().generic_visit(node)


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _is_setup(cell: NotebookNode) -> bool:
    """Whether it is the setup cell, which follows the book's address and outputs nothing."""
    return "GPTLITE_REPO" in cell.source


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


@cache
def _module(file: Path) -> str:
    tree = sources.parsed(file)
    # a release changes the version, and no output
    tree.body = [node for node in tree.body if "__version__" not in _assigned(node)]
    return sources.meaning(tree)


def _assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@cache
def _imported(file: Path) -> list[str]:
    return sources.imported(sources.parsed(file))


@cache
def _record(file: Path) -> str:
    return sources.digest(file.read_bytes())


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if no chapter changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a notebook; all if none is named"
    )
    parser.add_argument(
        "--write", action="store_true", help="store the digest of what is there now"
    )
    options = parser.parse_args(arguments)
    changed = 0
    for path in notebook_files.find(options.names):
        notebook = notebook_files.read(path)
        new = made_from(notebook)
        why = changes(stored(notebook), new)
        if why and options.write:
            put(notebook, new)
            notebook_files.write(notebook, path)
            print(f"{path.stem}: written.")
        else:
            changed += bool(why)
            print(f"{path.stem}: {'; '.join(why) or 'nothing changed'}.")
    return 1 if changed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"digests: {error}")
