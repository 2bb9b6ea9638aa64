"""The notebooks as a stranger opens them on Colab: a fresh environment without gptlite.

The environment holds what Colab has that the book needs: torch, numpy, matplotlib, ipykernel,
nbclient and tqdm. The setup cell clones the repository, as it is in the working tree, from a
local path; only the package index is asked. One notebook runs from top to bottom. Of the others
it is the imports that could fail there and not here, and the C++ that the package compiles: all
else is what `nbval` executes. One kernel imports what all chapters do, once they installed it.
"""

import ast
import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import notebook_files
import pytest
import setup_cell
import sources
from packaging.requirements import Requirement

pytestmark = [pytest.mark.colab, pytest.mark.notebook, pytest.mark.slow]

# what to install, as a bare `torch` for the newest release; empty for what is installed here
TORCH = os.environ.get("GPTLITE_COLAB_TORCH", "")
COLAB_HAS = ["numpy", "matplotlib", "ipykernel", "nbclient", "tqdm"]
CHAPTERS = sorted(notebook_files.NOTEBOOKS.glob("*.ipynb"))

WHOLE = "baseline"

# a line for IPython, such as `%pip install onnx`
MAGIC = re.compile(r"^([ \t]*)[!%].*", re.MULTILINE)

RUN_ALL = """
import json, sys
import nbclient, nbformat
path = sys.argv[1]
notebook = nbformat.read(path, as_version=4)
facts = "gptlite.__file__, gptlite.__version__, torch.__version__"
facts = f"import gptlite, torch; print(); print({facts}, sep=chr(10))"
notebook.cells.append(nbformat.v4.new_code_cell(facts))
quiet = ["--log-level=ERROR"]
client = nbclient.NotebookClient(
    notebook, timeout=900, kernel_name="python3", extra_arguments=quiet
)
client.execute()
first = next(cell for cell in notebook.cells if cell.cell_type == "code")
setup = "".join(output.get("text", "") for output in first.outputs)
print(json.dumps([setup, *notebook.cells[-1].outputs[-1].text.split(chr(10))[-4:-1]]))
"""


def run(command, **options):
    """The output of a command; its last lines are the message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        pytest.fail(
            f"{' '.join(map(str, command))[:200]}\n"
            f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}",
            pytrace=False,
        )
    return done.stdout


def imports(source):
    """The import statements in a cell, but for those in a `try`, which can do without."""
    found, waiting = [], [ast.parse(MAGIC.sub(r"\1pass", source))]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(ast.unparse(node))
        elif not isinstance(node, ast.Try):
            waiting += ast.iter_child_nodes(node)
    return found


def code_cells(path):
    """The sources of the code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def installing_and_imports(path):
    """The cells of a notebook that install something, and the import lines of all others."""
    installing = [source for source in code_cells(path) if MAGIC.search(source)]
    others = [source for source in code_cells(path) if source not in installing]
    return installing, [line for source in others for line in imports(source)]


def all_imports(paths):
    """One notebook of what chapters install and import; C++ is compiled where it is used."""
    installing, lines = [], []
    for path in paths:
        more_installing, more_lines = installing_and_imports(path)
        installing += more_installing
        lines += more_lines
    if any("load_kernels" in line for line in lines):
        lines.append("load_kernels()")
    sources = [*dict.fromkeys(installing), "\n".join(dict.fromkeys(lines))]
    cells = [
        {"cell_type": "code", "id": f"cell{i}", "source": source, "metadata": {}, "outputs": [],
         "execution_count": None}
        for i, source in enumerate(sources)
    ]  # fmt: skip
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


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
    package = (folder / "gptlite" / "__init__.py").read_text()
    version = re.search(r'__version__ = "(.+)"', package)[1]
    identity = {
        "user.name": "test",
        "user.email": "test@example.org",
        "commit.gpgsign": "false",
    }
    git = ["git", *(part for pair in identity.items() for part in ("-c", "=".join(pair)))]
    run([*git, "init", "-q"], cwd=folder)
    run([*git, "add", "-A"], cwd=folder)
    run([*git, "commit", "-q", "-m", "The working tree"], cwd=folder)
    run([*git, "tag", f"v{version}"], cwd=folder)
    return folder


def distributions(names):
    """Installed distributions and all that they require, directly or not."""
    found, waiting = {}, list(names)
    while waiting:
        if (name := waiting.pop().lower()) not in found:
            found[name] = metadata.distribution(name)
            needed = map(Requirement, found[name].requires or [])
            waiting += [
                need.name
                for need in needed
                if not need.marker or need.marker.evaluate({"extra": ""})
            ]
    return found.values()


def link_into(folder, names):
    """Give a fresh environment what is installed here of some distributions.

    Each file gets a second name, which takes no time: deleted or replaced there, it stays here.
    """
    ours, theirs = (
        Path(sysconfig.get_path("purelib", vars={"base": base, "platbase": base}))
        for base in (sys.prefix, str(folder))
    )
    for distribution in distributions(names):
        for file in distribution.files:
            if ".." not in file.parts:
                (theirs / file).parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    hard_link_or_copy(ours / file, theirs / file)


def hard_link_or_copy(source, target):
    """A second name of a file, or a copy where it lies on another disk."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of the fresh environment."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", folder])
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if TORCH:
        options = os.environ.get("PIP_ARGS", "").split()
        has = [TORCH, *COLAB_HAS]
        run([python, "-m", "pip", "install", "-q", "--no-compile", *options, *has])
    else:
        link_into(folder, ["torch", *COLAB_HAS])
    yield python
    # about a gigabyte, which pytest would keep for three runs
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def surroundings(python, repository):
    """Environment variables of a stranger: nothing of this checkout but where to clone from."""
    ours = ("PYTHON", "VIRTUAL_ENV", "JUPYTER", "GPTLITE", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {
        **kept,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "GPTLITE_REPO": repository.as_uri(),
    }


def run_as_a_stranger(notebook, name, folder, python, surroundings):
    """Run all cells of a notebook in an empty folder, where it has to fetch the book itself."""
    run([python, "-m", "pip", "uninstall", "-q", "-y", "gptlite", "safetensors"], cwd=folder)
    command = [python, "-c", "import gptlite"]
    missing = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True)
    assert b"No module named 'gptlite'" in missing.stderr
    (folder / name).write_text(json.dumps(notebook), encoding="utf-8")
    said = run([python, "-c", RUN_ALL, name], cwd=folder, env=surroundings)
    setup, file, version, torch_version = json.loads(said.splitlines()[-1])
    fetched = folder / "gptlite-book" / "gptlite" / "__init__.py"
    assert Path(file).resolve() == fetched.resolve()
    assert f"--branch v{version} " in setup_cell.setup_cell()
    assert "error" not in setup.lower()
    print_version = [python, "-c", "import torch; print(torch.__version__)"]
    assert torch_version == run(print_version, cwd=folder).strip()


def test_a_notebook_runs_where_only_torch_is_installed(tmp_path, python, surroundings):
    path = notebook_files.NOTEBOOKS / f"{WHOLE}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    run_as_a_stranger(notebook, path.name, tmp_path, python, surroundings)


def test_one_kernel_imports_what_every_chapter_does(tmp_path, python, surroundings):
    notebook = all_imports(CHAPTERS)
    run_as_a_stranger(notebook, "imports.ipynb", tmp_path, python, surroundings)


def not_installed(installing, lines):
    """Packages that import lines need, Colab does not have, and no cell installs."""
    names = {name for line in lines for name in sources.imported(ast.parse(line))}
    needed = {name.partition(".")[0] for name in names} - {"gptlite", "IPython", "torch"}
    absent = [name for name in needed - sys.stdlib_module_names if name not in COLAB_HAS]
    return [name for name in absent if name not in "\n".join(installing)]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_installs_what_it_imports(path):
    """Since all chapters share a kernel above, where one could use what another installed."""
    assert not not_installed(*installing_and_imports(path))


def test_a_package_that_no_cell_installs_is_found():
    lines = ["import os, numpy.linalg", "from onnx import helper", "from gptlite import model"]
    assert not_installed(["%pip install netron"], lines) == ["onnx"]
    assert not_installed(["%pip install onnx"], lines) == []


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
