"""Each rule is shown to fail on a tiny notebook that breaks it, and on no other."""

import re
import subprocess
import sys
from copy import deepcopy

import check_notebooks
import notebook_files
import pytest
import setup_cell
from nbformat import v4

COLAB = setup_cell.COLAB


def output(**data):
    """A displayed output; text_markdown="..." stands for text/markdown."""
    return v4.new_output(
        "display_data", data={mime.replace("_", "/", 1): text for mime, text in data.items()}
    )


PNG = {"image/png": "aGVsbG8="}


def code(source, *outputs, tags=()):
    return v4.new_code_cell(
        source, outputs=list(outputs), metadata={"tags": list(tags)} if tags else {}
    )


def text(source, **metadata):
    return v4.new_markdown_cell(source, metadata=metadata)


def good_cells():
    return [
        text(f"# A chapter\n\nA promise. {setup_cell.colab_line('chapter.ipynb')}"),
        code(setup_cell.setup_cell()),
        text(
            "## The idea\n\nWith $T = 256$ tokens, $2 \\cdot 6$ values; `5 ms` is code, "
            "32 x 256 a shape."
        ),
        code("from gptlite.show import show", tags=[]),
        code(
            "show(print)",
            output(text_markdown="```python\npass\n```"),
            tags=["nbval-check-output"],
        ),
        code(
            "x = 3\nx",
            v4.new_output("execute_result", data={"text/plain": "3"}, execution_count=4),
        ),
    ]


def write(folder, cells, name="chapter.ipynb", renumber=True):
    for number, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
        if renumber:
            cell.execution_count = number
    notebook_files.write(v4.new_notebook(cells=cells), folder / name)
    return folder / name


def faults(folder, *extra, cells=None, **options):
    """What is wrong with the good notebook and these cells at its end."""
    cells = (good_cells() if cells is None else cells) + list(extra)
    return check_notebooks.check([write(folder, cells, **options)])


def test_a_good_notebook_has_no_fault(tmp_path):
    assert faults(tmp_path) == []


# one fault each: the cell that breaks a rule, and a word of the sentence that says so
BAD_CELLS = {
    "empty": (code(" \n"), "the code cell is empty"),
    "long": (code("\n".join(f"a{i} = {i}" for i in range(26))), "26 lines, but at most 25"),
    "wide": (
        code(f"x = '{'-' * 91}'"),
        "has a line of 97 columns, but at most 96 fit the page",
    ),
    "wide listing": (
        code(
            "show(f)",
            output(text_markdown=f"```python\ndef f():\n    # {'-' * 91}\n```"),
            tags=["nbval-check-output"],
        ),
        "the listing has a line of 97 columns",
    ),
    "wide file": (
        code(
            "show(FOLDER / 'a.h')",
            output(text_markdown=f"```python\na\n```\n\n```cpp\n// {'-' * 94}\n```"),
            tags=["nbval-check-output"],
        ),
        "the listing has a line of 97 columns",
    ),
    "long listing": (
        code(
            "show(f)",
            output(text_markdown="```python\n@cache\ndef f(x):\n" + "    pass\n" * 39 + "```"),
            tags=["nbval-check-output"],
        ),
        "the listing of `def f(x)` has 41 lines, but one object may have at most 40",
    ),
    "second title": (text("# Another"), "second title"),
    "image without alt": (text("![](figure.png)"), "figure.png has no alt text"),
    "blank alt": (text("![ ](figure.png)"), "figure.png has no alt text"),
    "foreign image": (text("![A badge](https://example.org/b.svg)"), "another host"),
    "html image": (text('<img src="a.png">'), "has no alt text"),
    "html image, empty alt": (text('<img src="a.png" alt="">'), "has no alt text"),
    "foreign html image": (text('<img alt="A" src="//example.org/a.png">'), "another host"),
    "png output": (
        code("plot()", output(image_png="aGVsbG8=", text_plain="<Figure>")),
        "image/png output has no alt",
    ),
    "html output": (
        code("plot()", output(text_html='<svg viewBox="0 0 1 1"></svg>')),
        "aria-label",
    ),
    "svg, empty label": (
        code("p()", output(text_html='<svg role="img" aria-label=" "></svg>')),
        "aria-label",
    ),
    "img in output": (code("p()", output(text_html='<img src="data:x">')), "has no alt text"),
    "img in computed text": (
        code("p()", output(text_markdown="![](x.png)")),
        "has no alt text",
    ),
    "error": (
        code("1 / 0", v4.new_output("error", ename="E", evalue="v", traceback=[])),
        "error (E: v)",
    ),
    "stderr": (
        code("f()", v4.new_output("stream", name="stderr", text="careful\n")),
        "stderr (careful)",
    ),
    "address": (
        code("f()", output(text_plain="<f at 0x7f3a5c2b>")),
        "memory address (at 0x7f3a5c2b)",
    ),
    "machine's path": (
        code("f()", output(text_plain="saved to /home/ann/x.pt")),
        "one machine (/home/ann/x.pt)",
    ),
    "tagged, no output": (code("f()", tags=["nbval-check-output"]), "has no output to compare"),
    "tagged, only a picture": (
        code("f()", output(text_html="<b>1</b>"), tags=["nbval-check-output"]),
        "nbval compares none of its kinds",
    ),
    "show without output": (code("show(print)"), "no output is stored"),
    "print without output": (code("for i in []:\n    pass\nprint(1)"), "no output is stored"),
    "value without output": (code("y = 1\ny + 1"), "no output is stored"),
    "name twice": (
        code("def a():\n    pass\n\n\nclass a:\n    pass"),
        "a is already defined in chapter.ipynb",
    ),
    "name of the package": (
        code("def causal_mask(T):\n    pass"),
        "already defined in gptlite/model.py",
    ),
    "name under if": (
        code("if True:\n    class GPT:\n        pass"),
        "GPT is already defined in gptlite/model.py",
    ),
    "role": (text("See {cite}`vaswani2017`."), "{cite} is MyST"),
    "domain role": (text("See {glue:text}`speed:.1f`."), "{glue:text} is MyST"),
    "directive": (text("```{note}\nmind\n```"), "```{note} is MyST"),
    "colon fence": (text(":::{note}\nmind\n:::"), ":::{note} is MyST"),
    "target": (text("(a-label)=\n## Section"), "(a-label)= is MyST"),
    "role in computed text": (code("f()", output(text_markdown="{cite}`x`")), "{cite} is MyST"),
    "published without a link": (
        text("They report 3x.", tags=["published"]),
        "links to no publication",
    ),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_a_bad_cell_is_the_one_fault(tmp_path, case):
    cell, words = BAD_CELLS[case]
    [fault] = faults(tmp_path, deepcopy(cell))
    assert fault.startswith("chapter.ipynb, cell 7: ")
    assert words in re.sub("[“”]", "", fault)


GOOD_CELLS = {
    "25 lines": code("\n".join(f"a{i} = {i}" for i in range(25))),
    "96 columns": code(f"x = '{'-' * 90}'"),
    "two listings of 40 lines": code(
        "show(f, g)",
        output(text_markdown="\n\n".join(["```python\n" + "pass\n" * 40 + "```"] * 2)),
        tags=["nbval-check-output"],
    ),
    "a long and a wide file that is no listing": code(
        "say(text)", output(text_markdown=f"{'-' * 97}\n" * 41)
    ),
    "a long file of C++": code(
        "show(FOLDER / 'a.h')",
        output(text_markdown="```cpp\n" + "int a;\n" * 41 + "```"),
        tags=["nbval-check-output"],
    ),
    "a listing with a fence in it": code(
        "show(f)",
        output(text_markdown="````python\n```\n" + "pass\n" * 39 + "````"),
        tags=["nbval-check-output"],
    ),
    "png with alt": code(
        "f()", v4.new_output("display_data", data=PNG, metadata={"image/png": {"alt": "A."}})
    ),
    "decorative svg": code("f()", output(text_html='<svg aria-hidden="true"></svg>')),
    "source with a role": code(
        "f()", output(text_markdown='```python\n"""{glue:text}`x`"""\n```')
    ),
    "a name in a code span": text("Use `{name}` and `f'{x}'`."),
    "a formula with braces": text("$\\mathrm{x}$ and $$\\frac{a}{b}`$$"),
    "assignment needs no output": code("z = print"),
    "semicolon needs no output": code("z = 1\nz;"),
    "magic": code(
        "%load_ext autoreload\n!ls",
        v4.new_output("stream", name="stdout", text="chapter.ipynb\n"),
    ),
    "method of a toy": code("class Toy:\n    def rewind(self):\n        pass"),
    "a title in code": text("```bash\n# a comment\n```"),
    "published with a link": text(
        "They report 3x ([paper](https://arxiv.org/abs/1)).", tags=["published"]
    ),
}


@pytest.mark.parametrize("case", GOOD_CELLS)
def test_what_looks_like_a_fault_and_is_none(tmp_path, case):
    assert faults(tmp_path, deepcopy(GOOD_CELLS[case])) == []


def lines(count, *tags):
    """A cell of so many lines that displays nothing."""
    return code("\n".join(f"x = {i}" for i in range(count)), tags=tags)


@pytest.mark.parametrize("tag", ["hide-input", "hide-cell", "other"])
def test_the_median_counts_what_is_not_folded(tmp_path, tag):
    # three cells of one line stand in the good notebook besides the setup cell
    longer = [lines(9) for _ in range(4)]
    [fault] = faults(tmp_path, *map(deepcopy, longer))
    assert fault == (
        "chapter.ipynb: the median of its 7 code cells that are not folded is 9 lines, but may "
        "be at most 8."
    )
    assert faults(tmp_path, *longer[1:], lines(8), lines(8)) == []
    assert bool(faults(tmp_path, *longer[1:], lines(9, tag))) == (tag == "other")


TYPED = [
    "It takes 5 ms.",
    "takes\n12\nms",
    "**5.3x** faster",
    "about 5× more",
    "1-2x",
    "4 times faster",
    "a 5-fold gain",
    "12 GB/s",
    "12.5 MB",
    "8 GiB",
    "100 tok/s",
    "7 tokens per second",
    "65,000 characters a second",
    "21 MFLOPs",
    "197 GFLOP/s",
    "1.35 nats",
    "10 % less",
    "10% less",
    "10 percent",
    "3 minutes",
    "a 30-second run",
    "0.4\u00a0µs",
    "costs $5 and 3 ms, $x$",
    "| a | b |\n|---|---|\n| x | 5 ms |",
    "<details><summary>Answer</summary>It is 3x.</details>",
]
FREE = [
    "$5.3\\times$ and $3\\,\\mathrm{ms}$",
    "$$\nt = 3 ms\n$$",
    "`5 ms` and ``a ` 3x``",
    "```\n5 ms\n```",
    "~~~\n5 ms\n~~~",
    "32 x 256, 32 × 256 and 3x3",
    "256 tokens, 65 characters, 12 layers, 4 bytes, 16 bits",
    "10.8 M parameters, 2 FLOPs a weight",
    "PyTorch 2.13 on Python 3.10",
    "GPT-2's, GPT-2 small, the 1990s, an H200, int8, a T4",
    "1e-4, 2026-11-23, section 3",
    "[a link](https://example.org/5ms/3x)",
    "<!-- 5 ms -->",
    '<img src="x.png" alt="A" width="5 ms">',
    "Twice as fast, five times.",
]


@pytest.mark.parametrize("sentence", TYPED)
def test_a_typed_measurement_is_found(tmp_path, sentence):
    [fault] = faults(tmp_path, text(sentence))
    assert "is typed; compute it" in fault


@pytest.mark.parametrize("sentence", FREE)
def test_what_is_no_typed_measurement_passes(tmp_path, sentence):
    assert not [fault for fault in faults(tmp_path, text(sentence)) if "is typed" in fault]


def test_computed_measurements_are_free(tmp_path):
    assert faults(tmp_path, code("f()", output(text_markdown="**5.3x** faster, 3 ms"))) == []


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([1, 2, 3, None], "cell 6: the execution count is None, not 4"),
        ([1, 2, 4, 5], "cell 5: the execution count is 4, not 3"),
        ([2, 1, 3, 4], "cell 2: the execution count is 2, not 1"),
        ([1, 2, 3, 3], "cell 6: the execution count is 3, not 4"),
        ([None] * 4, "cell 2: the execution count is None, not 1"),
    ],
)
def test_counts_other_than_1_to_n_are_a_fault(tmp_path, counts, words):
    cells = good_cells()
    for cell, count in zip((c for c in cells if c.cell_type == "code"), counts, strict=True):
        cell.execution_count = count
    [fault] = faults(tmp_path, cells=cells, renumber=False)
    assert words in fault


def test_a_notebook_stripped_of_its_outputs_does_not_pass(tmp_path):
    """The blind spot of nbval: tests/test_notebooks.py shows that it passes this one."""
    cells = good_cells()
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs = []
    assert len(faults(tmp_path, cells=cells)) == 2


@pytest.mark.parametrize("change", ["absent", "edited", "not first"])
def test_the_setup_cell_is_the_same_everywhere(tmp_path, change):
    cells = good_cells()
    if change == "absent":
        del cells[1]
    elif change == "edited":
        cells[1].source += "\n"
    else:
        cells[1], cells[3] = cells[3], cells[1]
    [fault] = faults(tmp_path, cells=cells)
    assert fault.startswith("chapter.ipynb: the first code cell is not the setup cell")


def test_a_colab_link_to_another_notebook_is_a_fault(tmp_path):
    cells = good_cells()
    link = f"[Open in Colab]({setup_cell.colab_link('other.ipynb')})"
    cells[0].source = setup_cell.LINK.sub(link, cells[0].source)
    [fault] = faults(tmp_path, cells=cells)
    assert "should be" in fault


@pytest.mark.parametrize("cells", [[], [code("x = 1")], [text("A promise.")]])
def test_a_notebook_without_a_title_is_a_fault(tmp_path, cells):
    assert any("begins with the title" in fault for fault in faults(tmp_path, cells=cells))


def test_a_name_defined_in_two_notebooks_is_a_fault(tmp_path):
    paths = [
        write(
            tmp_path,
            [*good_cells()[:2], code("def toy_mask():\n    pass")],
            name=f"{name}.ipynb",
        )
        for name in ("first", "second")
    ]
    for path in paths:
        notebook = notebook_files.read(path)
        setup_cell.put(notebook, path.name)
        notebook_files.write(notebook, path)
    [fault] = check_notebooks.check(paths)
    assert fault.startswith(
        "second.ipynb, cell 3: toy_mask is already defined in first.ipynb, cell 3;"
    )


def test_a_large_file_is_a_fault(tmp_path):
    [fault] = faults(tmp_path, code("f()", output(text_plain="x" * 1_000_000)))
    assert "must have fewer than 1000000" in fault


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"cells": 3, "nbformat": 4, "nbformat_minor": 5}'],
)
def test_a_broken_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "broken.ipynb"
    path.write_bytes(content)
    [fault] = check_notebooks.check([path])
    assert fault.startswith("broken.ipynb: broken.ipynb is not a notebook")
    assert "\n" not in fault


def test_no_notebook_and_an_unknown_one_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="holds no notebook"):
        notebook_files.find([], tmp_path)
    write(tmp_path, good_cells())
    with pytest.raises(ValueError, match=r"no notebook is called 'kv'; known are chapter\."):
        notebook_files.find(["kv"], tmp_path)
    for name in ("chapter", "chapter.ipynb", str(tmp_path / "chapter.ipynb")):
        assert notebook_files.find([name], tmp_path) == [tmp_path / "chapter.ipynb"]


def test_the_command_fails_on_a_fault(tmp_path, monkeypatch, capsys):
    write(tmp_path, [*good_cells(), code("")])
    monkeypatch.setattr(notebook_files.find, "__defaults__", (tmp_path,))
    assert check_notebooks.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 fault in 1 notebook."
    write(tmp_path, good_cells())
    assert check_notebooks.main(["chapter"]) == 0
    assert capsys.readouterr().out.startswith(
        "chapter.ipynb: 4 code cells, 3 of them not folded, median 1 "
    )


def test_the_command_says_in_one_sentence_that_a_name_is_unknown():
    script = notebook_files.ROOT / "scripts" / "notebooks" / "check_notebooks.py"
    done = subprocess.run([sys.executable, script, "nowhere"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("check_notebooks: ")
    assert done.stderr.count("\n") == 1
