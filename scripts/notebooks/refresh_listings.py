"""Store the listings that `show(...)` displays anew, and nothing else: no cell is executed.

python scripts/notebooks/refresh_listings.py [NAME ...]     all notebooks if none is named

For a function that was reformatted or commented, whose chapter need not be measured again. What
a call of `show` needs is imported as the cells above it import it; other outputs and execution
counts stay as they are. A notebook is written only if all its listings could be made.
"""

import argparse
import ast
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import cells
import notebook_files
from nbformat import NotebookNode, v4


class ListingError(ValueError):
    """Why a listing cannot be made without executing the notebook, in one sentence."""


def fresh(notebook: NotebookNode) -> dict[int, list[str]]:
    """The listings that each cell would display now, by the cell's number (from 1).

    Raises ListingError for a call of `show` whose objects are not simply imported, and a
    ModuleNotFoundError where a package is missing that the chapter itself does without.
    """
    bound, found = {}, {}
    for number, cell in cells.code(notebook):
        statements = list(executed(cells.tree(cell.source).body))
        for node in statements:
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound |= dict.fromkeys(names_bound(node), node)
        calls = [node for node in statements if is_show(node)]
        if calls:
            found[number] = [listing(call, bound, number) for call in calls]
    return found


def listing(call: ast.Expr, bound: dict[str, ast.stmt], number: int) -> str:
    """What one call of `show` displays, in a namespace that holds the imports it needs."""
    needed = [node.id for node in ast.walk(call) if isinstance(node, ast.Name)]
    unknown = [name for name in needed if name not in bound]
    if unknown:
        raise ListingError(
            f"cell {number} shows {unknown[0]}, which no import defines; execute the notebook."
        )
    imports: list[ast.stmt] = [bound[name] for name in dict.fromkeys(needed)]
    code = ast.fix_missing_locations(ast.Module([*imports, call], []))
    # without a notebook around it, `show` prints the Markdown that it would display
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, f"<cell {number}>", "exec"), {})
    return printed.getvalue().removesuffix("\n")


def executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a cell, in order, those in the branches of `if`, `try` and `with` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            inner = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
            handlers = [
                n for n in ast.iter_child_nodes(node) if isinstance(n, ast.excepthandler)
            ]
            yield from executed([*inner, *(n for handler in handlers for n in handler.body)])


def is_show(node: ast.stmt) -> bool:
    """Whether a statement is a call of `show`."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "show"


def names_bound(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The names that an import makes known."""
    return [alias.asname or alias.name.partition(".")[0] for alias in node.names]


def refresh(notebook: NotebookNode) -> int:
    """Replace the listings in a notebook's outputs; return how many are not as they were.

    A cell of nothing but imports and `show` gets its listings also where none was stored.
    Raises ListingError if a cell's stored listings and its calls of `show` are not as many.
    """
    new, changed = fresh(notebook), 0
    for number, texts in new.items():
        cell = notebook.cells[number - 1]
        stored = [output for output in cell.outputs if cells.is_listing(output)]
        if not cell.outputs and all(
            isinstance(node, ast.Import | ast.ImportFrom) or is_show(node)
            for node in cells.tree(cell.source).body
        ):
            stored = [v4.new_output("display_data", {"text/markdown": ""}) for _ in texts]
            cell.outputs = stored
        if len(stored) != len(texts):
            raise ListingError(
                f"cell {number} stores {len(stored)} listings, but calls `show` {len(texts)} "
                "times; execute the notebook."
            )
        for output, text in zip(stored, texts, strict=True):
            changed += cells.text(output.data["text/markdown"]) != text
            output.data["text/markdown"] = text
    return changed


def stale(notebook: NotebookNode) -> list[int]:
    """The numbers of the cells whose stored listings are not the source as it is now."""
    new = fresh(notebook)
    stored = {
        number: [
            cells.text(output.data["text/markdown"])
            for output in notebook.cells[number - 1].outputs
            if cells.is_listing(output)
        ]
        for number in new
    }
    return [number for number, texts in new.items() if stored[number] != texts]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if every notebook could be refreshed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a notebook; all if none is named"
    )
    failed = 0
    for path in notebook_files.find(parser.parse_args(arguments).names):
        notebook = notebook_files.read(path)
        try:
            changed = refresh(notebook)
        except (ListingError, ModuleNotFoundError) as error:
            failed += 1
            print(f"{path.name}: {error} The file is as it was.", file=sys.stderr)
            continue
        if changed:
            notebook_files.write(notebook, path)
        print(f"{path.name}: {changed} listing{'s' * (changed != 1)} changed.")
    return 1 if failed else 0


if __name__ == "__main__":
    # the package beside this script, wherever another one is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"refresh_listings: {error}")
