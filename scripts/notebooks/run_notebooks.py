"""Execute notebooks in place, each in a fresh kernel, and store their outputs.

python scripts/notebooks/run_notebooks.py [NAME ...]      all of them if none is named

A notebook is written only when all its cells ran; otherwise the old file stays as it is. What
differs between two runs for no reason of the code's own (timestamps, widget states, versions of
the kernel) is left out; a digest of what the outputs were made from is added.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import digests
import notebook_files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

# what an author sets; editors and kernels add other metadata
CELL_KEYS = ("tags", "cellView", "jupyter")
WIDGET = "application/vnd.jupyter.widget-view+json"


class CellError(Exception):
    """A cell did not run to its end: the message says which and why, `details` the trace."""

    def __init__(self, sentence: str, details: str = ""):
        super().__init__(sentence)
        self.details = details


def execute(notebook: NotebookNode, folder: Path, timeout: float = 900, progress=print) -> None:
    """Run all cells in a new kernel in `folder`; `progress` is told of each in one line.

    Raises CellError at the first cell that fails, runs longer than `timeout` seconds, or takes
    the kernel with it.
    """
    code = [
        i
        for i, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and cell.source.strip()
    ]
    # of the cell that runs now: its position, and when it began
    running, started = 0, 0.0

    def on_start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal running, started
        running, started = cell_index, time.perf_counter()

    def on_executed(cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        number, seconds = code.index(cell_index) + 1, time.perf_counter() - started
        progress(f"  [{number:>2}/{len(code)}] {seconds:6.1f} s  {_first_line(cell)}")

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,  # how a stream is cut into pieces is a matter of chance
        on_cell_execute=on_start,
        on_cell_executed=on_executed,
    )
    try:
        # a stored progress bar is noise
        client.execute(env={**os.environ, "TQDM_DISABLE": "1"})
    except CellExecutionError as error:
        raise CellError(
            f"{_where(notebook, running)} raised {error.ename}: {error.evalue}.", str(error)
        ) from None
    except CellTimeoutError:
        raise CellError(
            f"{_where(notebook, running)} ran longer than {timeout:g} seconds."
        ) from None
    except DeadKernelError:
        raise CellError(
            f"{_where(notebook, running)} ended its kernel (out of memory?)."
        ) from None


def tidy(notebook: NotebookNode) -> None:
    """Leave out what makes two runs of the same code differ; keep what the author put there."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python", "pygments_lexer": "ipython3"},
    )
    for cell in notebook.cells:
        cell.metadata = NotebookNode(
            {key: cell.metadata[key] for key in CELL_KEYS if key in cell.metadata}
        )
        if cell.cell_type == "code":
            # a stored widget is dead: its state is gone with its kernel
            cell.outputs = [
                output for output in cell.outputs if WIDGET not in output.get("data", {})
            ]


def run(path: Path, timeout: float = 900, progress=print) -> float:
    """Execute one notebook, replace it if all its cells ran, and return the seconds it took."""
    notebook = notebook_files.read(path)
    parts = digests.made_from(
        notebook
    )  # of the code that the kernel imports, not of what it is then
    started = time.perf_counter()
    execute(notebook, path.parent, timeout, progress)
    tidy(notebook)
    digests.put(notebook, parts)
    notebook_files.write(notebook, path)
    return time.perf_counter() - started


def _first_line(cell: NotebookNode) -> str:
    line = cell.source.strip().splitlines()[0]
    return line if len(line) <= 80 else line[:79] + "…"


def _where(notebook: NotebookNode, index: int) -> str:
    return f"cell {index + 1} of {len(notebook.cells)} ({_first_line(notebook.cells[index])})"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if every notebook ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a notebook, such as kv_cache; all if none is named",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=900,
        metavar="SECONDS",
        help="at most this long for a cell",
    )
    options = parser.parse_args(arguments)
    paths, failed, total = notebook_files.find(options.names), 0, 0.0
    for path in paths:
        print(f"{path.name}", flush=True)
        try:
            seconds = run(path, options.timeout, lambda line: print(line, flush=True))
        except CellError as failure:
            failed += 1
            print(
                f"{failure.details}\n{path.name}: {failure} The file is as it was.".lstrip(),
                file=sys.stderr,
            )
        else:
            total += seconds
            print(
                f"{path.name}: executed in {seconds:.0f} s, {path.stat().st_size / 1e3:.0f} kB."
            )
    if len(paths) > 1:
        print(f"{len(paths) - failed} of {len(paths)} notebooks executed in {total:.0f} s.")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"run_notebooks: {error}")
