import ast

import notebook_files
import pytest
import setup_cell
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import v4

CONFIG = "repository:\n  url: https://github.com/ann/book.git/\n  branch: main\n"


@pytest.fixture
def root(tmp_path):
    """A repository with another address and version than this one's."""
    (tmp_path / "gptlite").mkdir()
    (tmp_path / "gptlite" / "__init__.py").write_text('"""Doc."""\n\n__version__ = "3.4.5"\n')
    (tmp_path / "_config.yml").write_text(CONFIG.replace(".git/", "/"))
    return tmp_path


def test_the_cell_follows_the_address_and_the_version(root):
    cell = setup_cell.setup_cell(root)
    assert '"GPTLITE_REPO", "https://github.com/ann/book")' in cell
    assert "--branch v3.4.5 {repository}" in cell


def test_a_git_ending_is_dropped(root):
    (root / "_config.yml").write_text(CONFIG.replace(".git/", ".git"))
    assert setup_cell.repository(root) == ("https://github.com/ann/book", "main")


def test_the_cell_is_short_and_python():
    cell = setup_cell.setup_cell()
    assert len(cell.splitlines()) <= 14
    assert max(map(len, cell.splitlines())) <= 96
    ast.parse(TransformerManager().transform_cell(cell))


def test_the_cell_is_silent_and_leaves_alone_where_gptlite_is_importable(capsys):
    def forbidden():
        raise AssertionError("the cell called IPython although gptlite is importable")

    names = {"get_ipython": forbidden}
    exec(TransformerManager().transform_cell(setup_cell.setup_cell()), names)
    assert capsys.readouterr() == ("", "")
    assert set(names) == {"get_ipython", "find_spec", "__builtins__"}


@pytest.mark.parametrize(
    "config", [None, "", "repository:\n", "repository:\n  url: x\n", "a: [", "repository: 3\n"]
)
def test_a_config_without_the_address_is_one_sentence(root, config):
    (root / "_config.yml").unlink()
    if config is not None:
        (root / "_config.yml").write_text(config)
    with pytest.raises(
        ValueError, match=r"does not give repository\.url and repository\.branch"
    ):
        setup_cell.setup_cell(root)


def notebook(*cells):
    return v4.new_notebook(cells=list(cells))


@pytest.mark.parametrize(
    "cells",
    [
        [v4.new_markdown_cell("# T"), v4.new_code_cell("x = 1")],
        [v4.new_code_cell("x = 1")],
        [
            v4.new_markdown_cell("# T"),
            v4.new_code_cell("old  # GPTLITE_REPO"),
            v4.new_code_cell("x = 1"),
        ],
        [
            v4.new_markdown_cell(f"# T\n\n[Open in Colab]({setup_cell.COLAB}x) and more"),
            v4.new_code_cell("x = 1"),
        ],
    ],
)
def test_put_makes_every_notebook_right_and_keeps_its_own_cells(root, cells):
    nb = notebook(*cells)
    setup_cell.put(nb, "kv_cache.ipynb", root)
    assert setup_cell.differences(nb, "kv_cache.ipynb", root) == []
    assert [cell.source for cell in nb.cells if cell.cell_type == "code"] == [
        setup_cell.setup_cell(root),
        "x = 1",
    ]
    assert nb.cells[0].cell_type == cells[0].cell_type or cells[0].source == "x = 1"
    before = nb.copy()
    setup_cell.put(nb, "kv_cache.ipynb", root)
    assert nb == before


def test_the_colab_link_opens_the_notebook_at_the_branch(root):
    nb = notebook(
        v4.new_markdown_cell(f"# T\n\n[Open in Colab]({setup_cell.COLAB}wrong/place.ipynb)")
    )
    setup_cell.put(nb, "kv_cache.ipynb", root)
    address = f"{setup_cell.COLAB}ann/book/blob/main/notebooks/kv_cache.ipynb"
    assert nb.cells[0].source == f"# T\n\n[Open in Colab]({address})"


def test_the_command_checks_writes_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebook_files.find, "__defaults__", (tmp_path,))
    notebook_files.write(notebook(v4.new_markdown_cell("# T")), tmp_path / "t.ipynb")
    assert setup_cell.main(["--check"]) == 1
    assert setup_cell.main(["--write"]) == 0
    assert setup_cell.main(["--check"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("t.ipynb: the first code cell is not the setup cell")
    assert said[1:] == ["t.ipynb: set."]
    assert setup_cell.main(["--print"]) == 0
    assert capsys.readouterr().out == setup_cell.setup_cell() + "\n"
