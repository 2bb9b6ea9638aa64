import re

import notebook_files
import pytest
import refresh_listings
from nbformat import v4
from refresh_listings import ListingError

IMPORTS = "from gptlite.model import GPT, causal_mask\nfrom gptlite.show import show"


def listing(text="```python\nold\n```"):
    return v4.new_output("display_data", {"text/markdown": text})


def printed(text):
    return v4.new_output("stream", name="stdout", text=text)


def write(path, *cells):
    """A notebook of code cells, each a source and its outputs; the counts are not in order."""
    code = [v4.new_code_cell(source, outputs=list(outputs)) for source, *outputs in cells]
    for number, cell in enumerate(code, 5):
        cell.execution_count = number
    notebook_files.write(v4.new_notebook(cells=[v4.new_markdown_cell("# T"), *code]), path)
    return path


def refreshed(tmp_path, *cells):
    """How many listings changed, and the outputs of each code cell."""
    notebook = notebook_files.read(write(tmp_path / "t.ipynb", (IMPORTS,), *cells))
    changed = refresh_listings.refresh(notebook)
    return changed, [cell.outputs for cell in notebook.cells[2:]]


def test_only_the_listing_is_new(tmp_path):
    other = listing("**5.3x** faster")
    cell = ("show(causal_mask)\nprint(x)", listing(), printed("3\n"), other)
    changed, [outputs] = refreshed(tmp_path, cell)
    assert changed == 1
    assert outputs[0].data["text/markdown"].startswith("```python\ndef causal_mask(")
    assert outputs[1:] == [printed("3\n"), other]


def test_nothing_is_executed_and_the_counts_stay(tmp_path, monkeypatch, capsys):
    path = write(
        tmp_path / "t.ipynb",
        (IMPORTS + "\nraise AssertionError",),
        ("open('trace', 'w').close()\nshow(GPT.__init__)", listing()),
    )
    monkeypatch.setattr(notebook_files.find, "__defaults__", (tmp_path,))
    monkeypatch.chdir(tmp_path)
    assert refresh_listings.main(["t"]) == 0
    assert capsys.readouterr().out == "t.ipynb: 1 listing changed.\n"
    assert list(tmp_path.iterdir()) == [path]
    notebook = notebook_files.read(path)
    assert [cell.execution_count for cell in notebook.cells[1:]] == [5, 6]
    assert "def __init__(self" in notebook.cells[2].outputs[0].data["text/markdown"]
    written = path.stat().st_mtime_ns
    assert refresh_listings.main(["t"]) == 0
    assert capsys.readouterr().out == "t.ipynb: 0 listings changed.\n"
    assert path.stat().st_mtime_ns == written


def test_branches_are_followed_and_functions_are_not(tmp_path):
    cells = [
        (
            "try:\n    from gptlite import units\n    show(units)\n"
            "except ImportError:\n    pass",
        ),
        ("if units:\n    show(units.three_digits)",),
        ("def f():\n    show(nothing)",),
    ]
    changed, outputs = refreshed(
        tmp_path, (*cells[0], listing()), (*cells[1], listing()), cells[2]
    )
    assert changed == 2
    assert re.match('```python\n"""', outputs[0][0].data["text/markdown"])
    assert outputs[1][0].data["text/markdown"].startswith("```python\ndef three_digits(")
    assert outputs[2] == []


def test_a_new_cell_of_listings_alone_is_filled(tmp_path):
    changed, [outputs] = refreshed(tmp_path, ("show(GPT.forward)\nshow(causal_mask)",))
    assert changed == 2
    assert ["def forward" in o.data["text/markdown"] for o in outputs] == [True, False]


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        (("toy = GPT\nshow(toy)", listing()), "cell 3 shows toy, which no import defines"),
        (("x = 1\nshow(GPT)",), "cell 3 stores 0 listings, but calls `show` 1 times"),
        (("show(GPT)", listing(), listing()), "cell 3 stores 2 listings, but calls"),
    ],
)
def test_what_cannot_be_refreshed_is_refused_and_the_file_stays(
    tmp_path, cell, sentence, monkeypatch, capsys
):
    stale = ("show(causal_mask)", listing())
    with pytest.raises(ListingError, match=re.escape(sentence)):
        refreshed(tmp_path, cell, stale)
    before = (tmp_path / "t.ipynb").read_bytes()
    monkeypatch.setattr(notebook_files.find, "__defaults__", (tmp_path,))
    assert refresh_listings.main([]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.endswith("The file is as it was.\n")
    assert (tmp_path / "t.ipynb").read_bytes() == before


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    write(tmp_path / "t.ipynb", (IMPORTS,), ("import absent\nshow(absent)", listing()))
    monkeypatch.setattr(notebook_files.find, "__defaults__", (tmp_path,))
    assert refresh_listings.main([]) == 1
    assert "No module named 'absent'" in capsys.readouterr().err


def test_a_stale_listing_is_found(tmp_path):
    path = write(
        tmp_path / "t.ipynb", (IMPORTS,), ("show(GPT)", listing()), ("show(causal_mask)",)
    )
    notebook = notebook_files.read(path)
    assert refresh_listings.stale(notebook) == [3, 4]
    refresh_listings.refresh(notebook)
    assert refresh_listings.stale(notebook) == []
