"""Where the notebooks are, and how they are read and written, for the notebook scripts."""

import os
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def find(names: list[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks called `names`, or all: "kv_cache", "kv_cache.ipynb", or a file's path.

    A ValueError lists the known ones.
    """
    known = sorted(folder.glob("*.ipynb"))
    if not known:
        raise ValueError(f"{folder} holds no notebook.")
    by_name = {path.stem: path for path in known}
    # a path may be of a file elsewhere, such as another checkout's
    chosen = [
        path if (path := Path(name)).suffix and path.is_file() else by_name.get(path.stem)
        for name in names
    ]
    if None in chosen:
        raise ValueError(
            f"no notebook is called {names[chosen.index(None)]!r}; known are "
            f"{', '.join(by_name)}."
        )
    return chosen or known


def read(path: Path) -> NotebookNode:
    """The notebook in format 4; a ValueError says what is wrong with a broken one."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises whatever its JSON and schema libraries do
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path.name} is not a notebook ({reason}).") from None
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook, which appears only when it is whole."""
    part = path.with_name(path.name + ".part")
    nbformat.write(notebook, part)
    os.replace(part, path)
