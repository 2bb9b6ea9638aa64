"""The cells of a notebook as the notebook scripts read them, numbered from 1, Markdown too."""

import ast
import re
import warnings

from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

FENCED = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


def code(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """The code cells with their numbers."""
    return [(i, cell) for i, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code"]


def markdown(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """The Markdown cells with their numbers."""
    return [
        (i, cell) for i, cell in enumerate(notebook.cells, 1) if cell.cell_type == "markdown"
    ]


def outputs(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """All outputs with the numbers of their cells."""
    return [(number, output) for number, cell in code(notebook) for output in cell.outputs]


def text(value: str | list[str]) -> str:
    """Text of an output, which a notebook may store as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def is_listing(output: NotebookNode) -> bool:
    """Whether an output is what `gptlite.show.show` displays: Markdown that begins as code."""
    return text(output.get("data", {}).get("text/markdown", "")).startswith("```")


def listings(output: NotebookNode) -> list[tuple[str, str]]:
    """Language and source of each listed object of an output; none if it is no listing."""
    if not is_listing(output):
        return []
    found = FENCED.findall(text(output.data["text/markdown"]))
    return [(language, source) for _, language, source in found]


def tree(source: str) -> ast.Module:
    """The syntax tree of a cell, magics included; an empty one if it is not Python."""
    try:
        with warnings.catch_warnings():
            # a doubtful escape is for whoever runs the cell to see
            warnings.simplefilter("ignore")
            return ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError:
        return ast.Module([], [])
