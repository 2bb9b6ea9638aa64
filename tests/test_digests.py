import json

import digests
import notebook_files
import pytest
from nbformat import v4

FILES = {
    "requirements.txt": "torch==1\nnumpy==1\nonnx==1\ntqdm==1\n",
    "gptlite/__init__.py": '"""The package."""\n__version__ = "1"\n',
    "gptlite/model.py": "import torch\n\n\nN = 1\n",
    "gptlite/far.py": "from gptlite import model\n",
    "gptlite/near.py": "from gptlite.far import model\nfrom gptlite.results import runs\n",
    "gptlite/other.py": "import onnx\n",
    "gptlite/results.py": "import tqdm\n",
    "gptlite/checkpoints.py": "",
    "gptlite/kernels/__init__.py": "",
    "gptlite/kernels/load.py": "",
    "gptlite/kernels/rows.cpp": "int one = 1;\n",
    "assets/checkpoints/teacher.safetensors": "weights",
    "assets/results/here.json": "{}",
    "assets/results/pruning/search.json": "{}",
    "assets/results/pruning/halves.json": "{}",
    "assets/results/distillation/students.json": "{}",
}
CELLS = ["from gptlite import near\nx = 3", "x + 1", "show(near)"]
SETUP = 'import os\nos.environ.get("GPTLITE_REPO", "https://github.com/a/b")'


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def chapter(*sources, **metadata):
    return v4.new_notebook(cells=[v4.new_code_cell(s) for s in sources], metadata=metadata)


def made_from(root, *sources):
    for function in (digests._module, digests._imported, digests._record):
        function.cache_clear()
    return digests.made_from(chapter(SETUP, *sources), root)


def test_the_parts_are_what_the_cells_lead_to(root):
    parts = made_from(root, *CELLS)
    names = {part: [*named] for part, named in parts.items()}
    modules = ["__init__", "far", "model", "near", "results"]
    assert names == {
        "cells": ["cells"],
        "modules": [f"gptlite/{name}.py" for name in modules],
        "records": ["assets/results/here.json"],
        "versions": ["torch"],
    }


def edit(root, name, old, new):
    path = root / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


CHANGED = {
    "gptlite/model.py": ("N = 1", "N = 2", "gptlite/model.py changed"),
    "assets/results/here.json": ("{}", "[]", "assets/results/here.json changed"),
    "requirements.txt": ("torch==1", "torch==2", "torch changed"),
    "gptlite/far.py": ("model", "other", None),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_is_named(root, name):
    old, new, sentence = CHANGED[name]
    before = made_from(root, *CELLS)
    edit(root, name, old, new)
    if name == "gptlite/far.py":
        edit(root, "gptlite/near.py", "import model", "import other")
        assert digests.changes(before, made_from(root, *CELLS)) == [
            "gptlite/far.py changed",
            "gptlite/model.py is no longer used",
            "gptlite/near.py changed",
            "gptlite/other.py is new to it",
            "onnx is new to it",
            "torch is no longer used",
        ]
    else:
        assert digests.changes(before, made_from(root, *CELLS)) == [sentence]


UNCHANGED = {
    "gptlite/other.py": ("onnx", "numpy"),
    "gptlite/near.py": ("\nfrom", "  # a comment\n\nfrom"),
    "gptlite/__init__.py": ('"1"', '"2"'),
    "assets/results/pruning/search.json": ("{}", "[]"),
    "assets/checkpoints/teacher.safetensors": ("w", "W"),
    "gptlite/kernels/rows.cpp": ("1", "2"),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_the_chapter_does_not_use_does_not_count(root, name):
    before = made_from(root, *CELLS)
    edit(root, name, *UNCHANGED[name])
    assert digests.changes(before, made_from(root, *CELLS)) == []


@pytest.mark.parametrize("package", ["numpy", "onnx", "tqdm"])
def test_only_the_versions_that_matter_to_the_chapter_count(root, package):
    before = made_from(root, *CELLS)
    edit(root, "requirements.txt", f"{package}==1", f"{package}==2")
    assert digests.changes(before, made_from(root, *CELLS)) == []


SAME_CELLS = {
    "comments and layout": ["from gptlite import near\n\n# three\nx = (3)", *CELLS[1:]],
    "another cut": ["from gptlite import near", "x = 3", "x + 1\nshow(near)"],
    "an import elsewhere": ["x = 3", "x + 1", "from gptlite import near\nshow(near)"],
    "other listings": [*CELLS[:2], "show(near.far)\nshow(near)"],
}


@pytest.mark.parametrize("case", SAME_CELLS)
def test_cells_that_do_the_same_have_the_same_digest(root, case):
    assert made_from(root, *SAME_CELLS[case]) == made_from(root, *CELLS)


@pytest.mark.parametrize(
    "cells",
    [
        ["from gptlite import near\nx = 4", *CELLS[1:]],
        [*CELLS[:1], "x - 1"],
        ["from gptlite import near as far\nx = 3", *CELLS[1:]],
        [*CELLS, "%timeit x"],
    ],
)
def test_cells_that_do_something_else_changed(root, cells):
    assert digests.changes(made_from(root, *CELLS), made_from(root, *cells)) == [
        "cells changed"
    ]


def test_the_address_in_the_setup_cell_does_not_count(root):
    moved = chapter(SETUP.replace("a/b", "c/d"), *CELLS)
    assert digests.made_from(moved, root) == made_from(root, *CELLS)


@pytest.mark.parametrize(
    ("cell", "files"),
    [
        ("runs('distillation/students')", ["results/distillation/students"]),
        ("FOLDER / 'pruning'", ["results/pruning/halves", "results/pruning/search"]),
        ("'pruning/search.json'", ["results/pruning/search"]),
        ("'a text on pruning'", []),
    ],
)
def test_named_records_count(root, cell, files):
    named = [f"assets/{file}.json" for file in files]
    assert [*made_from(root, cell)["records"]] == named


def test_checkpoints_and_kernels_count_where_they_are_used(root):
    cells = ["from gptlite.checkpoints import load\nfrom gptlite.kernels.load import f"]
    before = made_from(root, *cells)
    edit(root, "assets/checkpoints/teacher.safetensors", "w", "W")
    edit(root, "gptlite/kernels/rows.cpp", "1", "2")
    assert digests.changes(before, made_from(root, *cells)) == [
        "gptlite/kernels/rows.cpp changed",
        "assets/checkpoints/teacher.safetensors changed",
    ]
    edit(root, "gptlite/kernels/rows.cpp", ";", ";  // a comment")
    assert digests.changes(made_from(root, *cells), made_from(root, *cells)) == []


def test_a_notebook_without_a_digest_has_changed(root):
    notebook = chapter(*CELLS)
    assert digests.stored(notebook) is None
    assert digests.changes(None, made_from(root, *CELLS)) == [
        "it carries no digest of what made its outputs"
    ]


def test_the_command_says_what_changed_and_vouches(tmp_path, monkeypatch, capsys):
    notebook_files.write(chapter("x = 3"), tmp_path / "t.ipynb")
    monkeypatch.setattr(notebook_files.find, "__defaults__", (tmp_path,))
    assert digests.main([]) == 1
    assert capsys.readouterr().out == "t: it carries no digest of what made its outputs.\n"
    assert digests.main(["--write"]) == 0
    assert digests.main([]) == 0
    assert capsys.readouterr().out == "t: written.\nt: nothing changed.\n"
    stored = json.loads((tmp_path / "t.ipynb").read_text())
    stored["cells"][0]["source"] = "x = 4"
    (tmp_path / "t.ipynb").write_text(json.dumps(stored))
    assert digests.main(["t"]) == 1
    assert capsys.readouterr().out == "t: cells changed.\n"
