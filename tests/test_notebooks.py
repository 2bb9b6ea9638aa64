"""The chapters as they are stored; `make test` also executes some, by nbval (run_tests.py)."""

import re
import subprocess
import sys

import check_notebooks
import notebook_files
import pytest
import refresh_listings
import yaml
from nbformat import v4


def chapters_in_toc():
    """Notebooks that the table of contents lists."""

    def files(entry):
        yield from [entry[key] for key in ("file", "root") if key in entry]
        for part in (
            entry.get("parts", []) + entry.get("chapters", []) + entry.get("sections", [])
        ):
            yield from files(part)

    toc = yaml.safe_load((notebook_files.ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return {
        file.removeprefix("notebooks/") for file in files(toc) if file.startswith("notebooks/")
    }


def test_the_table_of_contents_lists_the_chapters_and_no_other():
    chapters = {path.stem for path in notebook_files.find([])}
    assert chapters == {name.removesuffix(".ipynb") for name in chapters_in_toc()}


def test_the_stored_notebooks_have_no_fault():
    assert check_notebooks.check(notebook_files.find([])) == []


def test_every_chapter_compares_its_listings_and_results():
    for path in notebook_files.find([]):
        code = [cell for cell in notebook_files.read(path).cells if cell.cell_type == "code"]
        compared = [
            cell for cell in code if "nbval-check-output" in cell.metadata.get("tags", [])
        ]
        listings = [cell for cell in code if re.search(r"^show\(", cell.source, re.MULTILINE)]
        assert len(compared) >= 5, path.name
        untagged = [cell.source for cell in listings if cell not in compared]
        assert listings, f"{path.name} shows no source of the package"
        assert not untagged, (
            f"{path.name} shows source that may go stale: tag {untagged} nbval-check-output"
        )


@pytest.mark.parametrize("path", notebook_files.find([]), ids=lambda path: path.stem)
def test_a_listing_is_the_source_as_it_is(path):
    """No digest follows a comment or a docstring, so that a chapter is not executed for one."""
    try:
        stale = refresh_listings.stale(notebook_files.read(path))
    except ModuleNotFoundError as missing:
        pytest.skip(f"the chapter lists what needs a package: {missing}")
    assert not stale, f"cells {stale} list what the source was; run make refresh NB={path.stem}"


def displayed(mime, text):
    """A cell that displays `text`, and its stored output."""
    source = f"from IPython.display import display\ndisplay({{{mime!r}: {text!r}}}, raw=True)"
    return source, v4.new_output("display_data", data={mime: text})


@pytest.mark.notebook
def test_what_nbval_notices_here_and_what_it_does_not(tmp_path):
    def write(name, source, *outputs, count=1):
        cell = v4.new_code_cell(
            source, outputs=list(outputs), metadata={"tags": ["nbval-check-output"]}
        )
        cell.execution_count = count
        path = tmp_path / f"{name}.ipynb"
        notebook_files.write(v4.new_notebook(cells=[cell]), path)
        return path

    source, stored = displayed("text/markdown", "```python\nnew\n```")
    write("listing", source, stored)
    write("stale_listing", source, displayed("text/markdown", "```python\nold\n```")[1])
    write(
        "other_drawing",
        displayed("text/html", "<svg>new</svg>")[0],
        displayed("text/html", "<svg>old</svg>")[1],
    )
    write(
        "other_svg",
        displayed("image/svg+xml", "<svg/>")[0],
        displayed("image/svg+xml", "<svg></svg>")[1],
    )
    write("other_number", "print(1)", v4.new_output("stream", name="stdout", text="2\n"))
    write("error", "1 / 0", v4.new_output("stream", name="stdout", text="2\n"))
    never_run = write("never_run", source, count=None)

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "-rA",
        "--color=no",
    ]
    command += ["--nbval-lax", "--nbval-current-env", str(tmp_path)]
    done = subprocess.run(command, cwd=notebook_files.ROOT, capture_output=True, text=True)
    outcome = {
        n: word
        for word, n in re.findall(
            r"^(PASSED|FAILED) \S*?(\w+)\.ipynb", done.stdout, re.MULTILINE
        )
    }
    assert outcome == {
        "listing": "PASSED",
        "stale_listing": "FAILED",
        "other_drawing": "PASSED",
        "other_svg": "PASSED",
        "other_number": "FAILED",
        "error": "FAILED",
        "never_run": "PASSED",
    }, done.stdout
    # the blind spot, closed
    assert any(
        "execution count is None" in fault for fault in check_notebooks.check([never_run])
    )
