import subprocess
import sys

import digests
import notebook_files
import pytest
import run_notebooks
from nbformat import v4

pytestmark = pytest.mark.notebook


def write(path, *sources, **metadata):
    cells = [v4.new_markdown_cell("# T")] + [v4.new_code_cell(source) for source in sources]
    notebook_files.write(v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def quiet(line):
    pass


def test_outputs_counts_and_folder(tmp_path):
    path = write(
        tmp_path / "t.ipynb",
        "from pathlib import Path\nx = 3",
        "print(x)\nprint(Path.cwd().name)\nx + 1",
    )
    lines = []
    assert run_notebooks.run(path, progress=lines.append) > 0
    first, second = (
        cell for cell in notebook_files.read(path).cells if cell.cell_type == "code"
    )
    assert (first.execution_count, first.outputs, second.execution_count) == (1, [], 2)
    assert second.outputs[0].text == f"3\n{tmp_path.name}\n"
    assert second.outputs[1].data == {"text/plain": "4"}
    assert [line.split()[:2] for line in lines] == [["[", "1/2]"], ["[", "2/2]"]]
    assert list(tmp_path.iterdir()) == [path]


def test_no_progress_bar_is_stored(tmp_path):
    code = "from tqdm import tqdm\nfor i in tqdm(range(3)):\n    pass\nprint(i)"
    path = write(tmp_path / "t.ipynb", code)
    run_notebooks.run(path, progress=quiet)
    (output,) = notebook_files.read(path).cells[1].outputs
    assert (output.name, output.text) == ("stdout", "2\n")


def test_two_runs_give_the_same_bytes_and_no_noise(tmp_path):
    code = """\
import sys
from IPython.display import display
print(1, flush=True)
print("careful", file=sys.stderr)
print(2, flush=True)
widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "bar"}
display(widget, raw=True)
glued = {"scrapbook": {"name": "n", "mime_prefix": ""}}
display({"text/plain": "5"}, raw=True, metadata=glued)"""
    path = write(
        tmp_path / "t.ipynb",
        code,
        widgets={"state": {}},
        language_info={"name": "python", "version": "1"},
    )
    notebook = notebook_files.read(path)
    kept = {
        "tags": ["nbval-check-output"],
        "cellView": "form",
        "jupyter": {"source_hidden": True},
    }
    notebook.cells[1].metadata = {
        **kept,
        "execution": {"iopub.status.busy": "now"},
        "scrolled": True,
    }
    notebook_files.write(notebook, path)
    run_notebooks.run(path, progress=quiet)
    first = path.read_bytes()
    run_notebooks.run(path, progress=quiet)
    assert path.read_bytes() == first
    notebook = notebook_files.read(path)
    cell = notebook.cells[1]
    assert cell.metadata == kept
    assert set(notebook.metadata) == {"kernelspec", "language_info", "gptlite"}
    assert digests.stored(notebook) == digests.made_from(notebook)
    assert "version" not in notebook.metadata.language_info
    streams = {
        output.name: output.text for output in cell.outputs if output.output_type == "stream"
    }
    assert streams == {
        "stdout": "1\n2\n",
        "stderr": "careful\n",
    }  # kept, so that check_notebooks.py can refuse it
    assert [output.metadata.scrapbook.name for output in cell.outputs if "data" in output] == [
        "n"
    ]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("a = 1\n1 / 0", r"cell 3 of 4 \(a = 1\) raised ZeroDivisionError: division by zero\."),
        ("import os\nos._exit(1)", r"cell 3 of 4 \(import os\) ended its kernel"),
        (
            "import time\ntime.sleep(60)",
            r"cell 3 of 4 \(import time\) ran longer than 3 seconds\.",
        ),
    ],
)
def test_a_failed_cell_is_named_and_the_file_stays(tmp_path, code, sentence):
    path = write(tmp_path / "t.ipynb", "x = 1", code, "y = 2")
    before = path.read_bytes()
    with pytest.raises(run_notebooks.CellError, match=sentence):
        run_notebooks.run(path, timeout=3, progress=quiet)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_runs_the_others_and_fails(tmp_path, monkeypatch, capsys):
    write(tmp_path / "bad.ipynb", "undefined")
    write(tmp_path / "good.ipynb", "1")
    monkeypatch.setattr(notebook_files.find, "__defaults__", (tmp_path,))
    assert run_notebooks.main([]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        "bad.ipynb: cell 2 of 2 (undefined) raised NameError: name 'undefined' is not defined. "
        "The file is as it was."
    )
    assert "good.ipynb: executed in" in said.out
    assert said.out.splitlines()[-1].startswith("1 of 2 notebooks executed in")
    assert run_notebooks.main(["good"]) == 0


def test_an_unknown_name_is_one_sentence():
    script = notebook_files.ROOT / "scripts" / "notebooks" / "run_notebooks.py"
    done = subprocess.run([sys.executable, script, "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("run_notebooks: ")
