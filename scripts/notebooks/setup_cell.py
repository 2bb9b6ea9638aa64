"""The setup cell that opens every notebook, and the line under its title that leads to Colab.

Both are derived from the address in _config.yml, and a check holds them equal to it.

python scripts/notebooks/setup_cell.py --check     say which notebooks differ (exit status 1)
python scripts/notebooks/setup_cell.py --write     set the cell and the link in every notebook
python scripts/notebooks/setup_cell.py --print     print the cell
"""

import argparse
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
import notebook_files
import yaml
from nbformat import NotebookNode

# The folder must not be called gptlite: beside a notebook, Python would take it for an empty
# package of that name. Paths are absolute because an editable install is not seen by a kernel
# that is already running.
TEMPLATE = """\
# Where gptlite is missing, as on Colab, fetch the book as it was when this page was made.
from importlib.util import find_spec

if not find_spec("gptlite"):
    import os
    import sys
    from pathlib import Path

    repository = os.environ.get("GPTLITE_REPO", "{address}")
    !git clone -q --depth 1 --branch v{version} {{repository}} gptlite-book
    %pip install -q --no-deps -e ./gptlite-book safetensors ninja
    sys.path.insert(0, str(Path("gptlite-book").resolve()))"""
# While the book has no address, the cell asks for one instead of cloning what is not there.
UNKNOWN = """\
    repository = os.environ.get("GPTLITE_REPO")
    if not repository:
        sys.exit("This copy has no address yet; set GPTLITE_REPO to that of a clone.")
"""
NOWHERE = "https://github.com/OWNER/REPO"
COLAB = "https://colab.research.google.com/github/"
UNPUBLISHED = "*Not published yet: where the book has an address, it opens on Colab from here.*"
LINK = re.compile(rf"\[Open in Colab\]\({re.escape(COLAB)}[^)]*\)|{re.escape(UNPUBLISHED)}")


@cache
def repository(root: Path = notebook_files.ROOT) -> tuple[str, str]:
    """Address and branch of the repository, as _config.yml has them."""
    config = root / "_config.yml"
    try:
        entry = yaml.safe_load(config.read_text(encoding="utf-8"))["repository"]
        return entry["url"].rstrip("/").removesuffix(".git"), entry["branch"]
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{config} does not give repository.url and repository.branch ({error!r})."
        ) from None


def published(root: Path = notebook_files.ROOT) -> bool:
    """Whether _config.yml names a real repository."""
    return repository(root)[0] != NOWHERE


def setup_cell(root: Path = notebook_files.ROOT) -> str:
    """The source of the first code cell of every notebook."""
    text = (root / "gptlite" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if not version:
        raise ValueError(f"{root / 'gptlite' / '__init__.py'} does not set __version__.")
    cell = TEMPLATE.format(address=repository(root)[0], version=version[1])
    return cell if published(root) else re.sub(r" +repository = .*\n", lambda _: UNKNOWN, cell)


def colab_link(name: str, root: Path = notebook_files.ROOT) -> str:
    """The address at which Colab opens notebooks/<name>."""
    address, branch = repository(root)
    place = address.removeprefix("https://github.com/")
    return f"{COLAB}{place}/blob/{branch}/notebooks/{name}"


def colab_line(name: str, root: Path = notebook_files.ROOT) -> str:
    """The line under a notebook's title: its link to Colab, or that there is none yet."""
    return f"[Open in Colab]({colab_link(name, root)})" if published(root) else UNPUBLISHED


def differences(
    notebook: NotebookNode, name: str, root: Path = notebook_files.ROOT
) -> list[str]:
    """What in a notebook is not as _config.yml says: one sentence each."""
    found = []
    remedy = "run scripts/notebooks/setup_cell.py --write"
    first, title = _first(notebook, "code"), _first(notebook, "markdown")
    if first is None or first.source != setup_cell(root):
        found.append(f"the first code cell is not the setup cell; {remedy}.")
    right = colab_line(name, root)
    wrong = [line for line in LINK.findall(title.source if title else "") if line != right]
    return found + [f"“{line}” should be “{right}”; {remedy}." for line in wrong]


def put(notebook: NotebookNode, name: str, root: Path = notebook_files.ROOT) -> None:
    """Set the setup cell (a new one if there is none) and the line that leads to Colab."""
    first = _first(notebook, "code")
    if first is None or "GPTLITE_REPO" not in first.source:
        after_title = 1 if notebook.cells and notebook.cells[0].cell_type == "markdown" else 0
        notebook.cells.insert(after_title, first := nbformat.v4.new_code_cell())
    first.source = setup_cell(root)
    first.metadata["tags"] = sorted({*first.metadata.get("tags", []), "hide-input"})
    if title := _first(notebook, "markdown"):
        title.source = LINK.sub(lambda _: colab_line(name, root), title.source)


def _first(notebook: NotebookNode, cell_type: str) -> NotebookNode | None:
    """The first cell of a type, if there is one."""
    return next((cell for cell in notebook.cells if cell.cell_type == cell_type), None)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    for name in ("check", "write", "print"):
        action.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    if options.print:
        print(setup_cell())
        return 0
    wrong = 0
    for path in notebook_files.find([]):
        notebook = notebook_files.read(path)
        sentences = differences(notebook, path.name)
        if options.write and sentences:
            put(notebook, path.name)
            notebook_files.write(notebook, path)
            print(f"{path.name}: set.")
        elif sentences:
            wrong += 1
            print("\n".join(f"{path.name}: {sentence}" for sentence in sentences))
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"setup_cell: {error}")
