import re
import sys
from pathlib import Path

import digests
import notebook_files
import pytest
import run_tests
from nbformat import v4
from run_tests import Part

A, B, C = (Path(f"notebooks/{name}.ipynb") for name in "abc")


def changed(*paths):
    return {path: ["model.py changed"] if path in paths else [] for path in (A, B, C)}


def test_each_day_another_chapter_has_its_turn():
    turns = [run_tests.in_turn(changed(), day) for day in range(738_000, 738_006)]
    assert turns == [A, B, C, A, B, C]
    assert [run_tests.in_turn(changed(B), day) for day in range(3)] == [A, C, C]
    assert run_tests.in_turn(changed(A, B, C), 5) is None


def test_what_changed_is_executed_and_one_more_in_turn():
    assert run_tests.chosen(changed(B), 2) == {
        B: "model.py changed",
        C: "nothing changed, but it is its turn today",
    }
    assert list(run_tests.chosen(changed(A, B, C), 0)) == [A, B, C]
    assert list(run_tests.chosen(changed(), 1)) == [B]
    assert list(run_tests.chosen(changed(B), 0, every=True)) == [A, B, C]


def test_it_is_said_which_and_why_and_why_not_the_others(capsys):
    why = {A: [f"{name} changed" for name in "vwxyz"], B: [], C: []}
    run_tests.announce(why, run_tests.chosen(why, 2))
    assert (
        capsys.readouterr().out
        == """\
Chapters to execute:
  a: v changed, w changed, x changed, 2 more.
  c: nothing changed, but it is its turn today.
Not executed, as nothing that made their outputs changed: b.
(`make test-all` executes every chapter.)
"""
    )


def test_the_reasons_are_read_from_the_notebooks(tmp_path):
    notebook = v4.new_notebook(cells=[v4.new_code_cell("x = 3")])
    notebook_files.write(notebook, tmp_path / "none.ipynb")
    digests.put(notebook, digests.made_from(notebook))
    notebook_files.write(notebook, tmp_path / "same.ipynb")
    notebook.cells[0].source = "x = 4"
    notebook_files.write(notebook, tmp_path / "other.ipynb")
    paths = notebook_files.find([], tmp_path)
    assert {path.stem: why for path, why in run_tests.reasons(paths).items()} == {
        "none": ["it carries no digest of what made its outputs"],
        "other": ["cells changed"],
        "same": [],
    }


def test_chapters_run_alone_after_all_else_and_are_compared():
    *others, last = run_tests.all_parts(
        [run_tests.ROOT / A, run_tests.ROOT / C], Path("/m.json")
    )
    assert last.command[-2:] == [str(A), str(C)]
    assert {"--nbval-lax", "--nbval-current-env", "no:xdist"} <= set(last.command)
    assert last.environment == {"GPTLITE_CALIBRATION": "/m.json"}
    assert not [part for part in others if part.environment or "notebooks" in part.command]
    names = [part.name for part in others]
    assert names.index("book") < names.index("tests")
    [tests] = [part.command for part in others if part.name == "tests"]
    assert "-m" not in tests[3:]  # none is left out


@pytest.mark.parametrize("options", [["--check"], []])
def test_a_part_that_fails_ends_no_other(options, monkeypatch, capfd):
    def parts(*_):
        codes = {"first": "exit(3)", "second": "import os; print(os.environ['HERE'])"}
        return [
            Part(name, [sys.executable, "-c", code], {"HERE": "there"})
            for name, code in codes.items()
        ]

    monkeypatch.setattr(run_tests, "quick_parts" if options else "all_parts", parts)
    monkeypatch.setattr(run_tests, "QUICK", "nothing")
    monkeypatch.setattr(run_tests, "TWO_PROCESSES", ["--version"])
    assert run_tests.main(options) == 1
    said = capfd.readouterr().out
    assert "=== first\n\n=== second\nthere\n" in said
    table = said.split("Time of each part\n")[1]
    assert re.search(r"^  first +\d+ s   FAILED\n  second +\d+ s$", table, re.MULTILINE)


def test_make_calls_it_for_tests_of_every_size():
    makefile = (run_tests.ROOT / "Makefile").read_text()
    for target, option in (("test", ""), ("test-all", " --all"), ("check", " --check")):
        recipe = re.search(
            rf"(?m)^{target}: .*\n\t@\$\(PY\) scripts/run_tests.py(.*)$", makefile
        )
        assert recipe[1] == option
    assert (run_tests.ROOT / ".ci" / "run").read_text().rstrip().endswith('make "${1:-test}"')
