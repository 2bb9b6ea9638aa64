"""Each notebook as a stranger opens it on Colab: a fresh environment without gptlite, an empty folder, Run all.

The environment holds what Colab has that the book needs: torch, numpy, matplotlib, ipykernel, nbclient and tqdm. The
setup cell clones the repository, as it is in the working tree, from a local path; only the package index is asked.
One notebook runs from top to bottom. Of the others it is the imports that could fail there and not here, and the C++
that the package compiles: all else is what `nbval` executes.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import notebook_files
import pytest
import setup_cell
import torch

pytestmark = [pytest.mark.colab, pytest.mark.notebook, pytest.mark.slow]

TORCH = f"torch=={torch.__version__.partition('+')[0]}"  # a bare `torch` would be whichever is newest
COLAB_HAS = [TORCH, "numpy", "matplotlib", "ipykernel", "nbclient", "tqdm"]
NAMES = sorted(path.stem for path in notebook_files.NOTEBOOKS.glob("*.ipynb"))

WHOLE = "baseline"

MAGIC = re.compile(
    r"^([ \t]*)[!%].*", re.MULTILINE
)  # a line for IPython, such as `%pip install onnx`

RUN_ALL = """
import json, sys
import nbclient, nbformat
path = sys.argv[1]
notebook = nbformat.read(path, as_version=4)
facts = "import gptlite, torch; print(); print(gptlite.__file__, gptlite.__version__, torch.__version__, sep=chr(10))"
notebook.cells.append(nbformat.v4.new_code_cell(facts))
nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", extra_arguments=["--log-level=ERROR"]).execute()
first = next(cell for cell in notebook.cells if cell.cell_type == "code")
setup = "".join(output.get("text", "") for output in first.outputs)
print(json.dumps([setup, *notebook.cells[-1].outputs[-1].text.split(chr(10))[-4:-1]]))
"""


def run(command, **options):
    """The output of a command; its last lines are the message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        pytest.fail(
            f"{' '.join(map(str, command))[:200]}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}",
            pytrace=False,
        )
    return done.stdout


def imports(source):
    """The import statements in a notebook's cell, but for those in a `try`, which says what to do without."""
    found, waiting = [], [ast.parse(MAGIC.sub(r"\1pass", source))]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(ast.unparse(node))
        elif not isinstance(node, ast.Try):
            waiting += ast.iter_child_nodes(node)
    return found


def shortened(notebook):
    """The cells that install something, and one with all imports; the package's C++ is compiled where it is used."""
    cells = [
        {**cell, "source": "".join(cell["source"])}
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]
    installing = [cell for cell in cells if MAGIC.search(cell["source"])]
    lines = [
        line for cell in cells if cell not in installing for line in imports(cell["source"])
    ]
    if any("load_kernels" in line for line in lines):
        lines.append("load_kernels()")
    return {
        **notebook,
        "cells": [*installing, {**cells[0], "id": "imports", "source": "\n".join(lines)}],
    }


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository with this working tree as its one commit, tagged as its version."""
    folder = tmp_path_factory.mktemp("repository")
    listed = run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=notebook_files.ROOT,
    )
    for name in filter(None, listed.split("\0")):
        source, target = notebook_files.ROOT / name, folder / name
        if source.is_file():  # a deleted file is still listed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    version = re.search(
        r'__version__ = "(.+)"', (folder / "gptlite" / "__init__.py").read_text()
    )[1]
    git = [
        "git",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    for step in (
        ["init", "-q"],
        ["add", "-A"],
        ["commit", "-q", "-m", "The working tree"],
        ["tag", f"v{version}"],
    ):
        run([*git, *step], cwd=folder)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of the fresh environment."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", folder])
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(
        [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-compile",
            *os.environ.get("PIP_ARGS", "").split(),
            *COLAB_HAS,
        ]
    )
    yield python
    shutil.rmtree(
        folder, ignore_errors=True
    )  # about a gigabyte, which pytest would keep for three runs


@pytest.fixture
def surroundings(python, repository):
    """Environment variables of a stranger: nothing of this checkout but the address to clone from."""
    ours = ("PYTHON", "VIRTUAL_ENV", "JUPYTER", "GPTLITE", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {
        **kept,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "GPTLITE_REPO": repository.as_uri(),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_where_only_torch_is_installed(
    tmp_path, python, repository, surroundings, name
):
    run([python, "-m", "pip", "uninstall", "-q", "-y", "gptlite", "safetensors"], cwd=tmp_path)
    missing = subprocess.run(
        [python, "-c", "import gptlite"], cwd=tmp_path, env=surroundings, capture_output=True
    )
    assert b"No module named 'gptlite'" in missing.stderr
    notebook = json.loads(
        (notebook_files.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    )
    chosen = notebook if name == WHOLE else shortened(notebook)
    (tmp_path / f"{name}.ipynb").write_text(json.dumps(chosen), encoding="utf-8")
    said = run([python, "-c", RUN_ALL, f"{name}.ipynb"], cwd=tmp_path, env=surroundings)
    setup, file, version, torch_version = json.loads(said.splitlines()[-1])
    assert (
        Path(file).resolve()
        == (tmp_path / "gptlite-book" / "gptlite" / "__init__.py").resolve()
    )
    assert f"--branch v{version} " in setup_cell.setup_cell()
    assert "error" not in setup.lower()
    before = run([python, "-c", "import torch; print(torch.__version__)"], cwd=tmp_path).strip()
    assert torch_version == before


CELL = """%pip install x
if a:
    !clone
if a:
    import b.c

def f():
    from d import e as g

try:
    import h
except ImportError:
    pass
"""


def test_an_import_is_found_wherever_it_stands():
    assert imports(CELL) == ["import b.c", "from d import e as g"]
