import math
import re
from functools import cached_property, wraps

import matplotlib as mpl
import matplotlib.pyplot as plt
import notebook_files
import pytest
import torch
from nbclient import NotebookClient
from nbformat import v4

from gptlite import kv_cache, model, show
from gptlite.pictures import DRAWING


@pytest.fixture
def rc():
    """Matplotlib's own settings, whatever another test has set; put back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.use("agg")
        yield


@pytest.fixture
def shown(monkeypatch, rc):
    """The outputs that a notebook would get: (data, metadata) of each."""
    outputs = []
    monkeypatch.setattr("IPython.get_ipython", lambda: object())
    monkeypatch.setattr(
        "IPython.display.display", lambda data, raw, metadata: outputs.append((data, metadata))
    )
    return outputs


def source_on_disk(path, first, last):
    """The lines of a file from the one that has `first` in it to the one that has `last`."""
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i >= start and last in line)
    return "\n".join(lines[start : end + 1])


# show


def test_a_listing_is_the_source_as_it_stands_in_the_file(shown):
    show.show(model.causal_mask)
    expected = source_on_disk(
        notebook_files.ROOT / "gptlite/model.py", "def causal_mask", ".tril(Tk - Tq)"
    )
    assert shown == [({"text/markdown": f"```python\n{expected}\n```"}, {})]


def test_classes_decorators_and_comments_are_listed_whole(shown):
    show.show(model.GPTConfig)
    path = notebook_files.ROOT / "gptlite/model.py"
    expected = source_on_disk(
        path,
        "@dataclass(frozen=True)",
        "return 4 * self.n_embd if self.n_hidden is None else self.n_hidden",
    )
    assert "  # the longest context" in expected
    assert shown[0][0]["text/markdown"] == f"```python\n{expected}\n```"


def test_methods_and_properties_are_dedented_and_several_objects_follow_each_other(shown):
    show.show(
        kv_cache.KVCache.rewind,
        kv_cache.KVCache.nbytes,
        model.GPT(model.GPTConfig(1, 1, 8)).n_params,
    )
    first, second, third = shown[0][0]["text/markdown"].split("\n\n```python")
    assert first.startswith('```python\ndef rewind(self, length: int = 0) -> None:\n    """')
    assert second.startswith("\n@property\ndef nbytes")
    assert third.startswith("\ndef n_params")
    assert all(part.endswith("```") for part in (first, second, third))


def test_a_module_and_a_wrapped_function_have_their_own_source(shown):
    @wraps(model.causal_mask)
    def wrapper(*arguments):
        return model.causal_mask(*arguments)

    show.show(wrapper)
    show.show(model)
    assert "def causal_mask" in shown[0][0]["text/markdown"]
    assert (notebook_files.ROOT / "gptlite/model.py").read_text().rstrip("\n") in shown[1][0][
        "text/markdown"
    ]


def test_a_file_is_listed_whole_in_its_own_language(shown, tmp_path):
    for name in ("kernel.cpp", "kernel.h"):
        (tmp_path / name).write_text("int main() {\n  return 0;\n}\n\n")
        show.show(tmp_path / name)
        assert shown[-1][0]["text/markdown"] == "```cpp\nint main() {\n  return 0;\n}\n```"
    with pytest.raises(FileNotFoundError):
        show.show(tmp_path / "another.cpp")


class Fenced:
    """Its source holds a fence:

    ```python
    pass
    ```
    """

    @cached_property
    def value(self):
        return 1


def test_a_fence_in_the_source_does_not_end_the_listing(shown):
    show.show(Fenced, Fenced.value)
    text = shown[0][0]["text/markdown"]
    assert text.startswith("````python\nclass Fenced:")
    assert text.count("````") == 2
    assert "def value(self)" in text.split("````")[2]


@pytest.mark.parametrize("obj", [len, 3, "text", torch.add, model.GPT2_SMALL])
def test_what_has_no_source_is_named(shown, obj):
    with pytest.raises(TypeError, match="has no Python source; show takes functions"):
        show.show(obj)
    assert shown == []


# say, table, glue


def glued(data, metadata):
    """What myst-nb reads from an output: (name, data) if it has a name."""
    from myst_nb.ext.glue import extract_glue_data_cell

    cell = v4.new_code_cell(
        outputs=[v4.new_output("display_data", data=data, metadata=metadata)]
    )
    found = [(name, dict(output["data"])) for name, output in extract_glue_data_cell(cell)]
    hidden = any(mime.startswith(show.GLUE_PREFIX) for mime in data)
    assert (
        len(cell.outputs) == (not hidden) or not found
    )  # a hidden output does not stay on the page
    return found


def test_say_and_table_are_markdown(shown):
    show.say("**5.3x** faster")
    show.table([["teacher", 1.5], ["a|b", "2.0x (1.9 to 2.1)"]], ["model", 1])
    show.table(iter([]), ["a", "b", "c"], align="lcr")
    assert shown[0] == ({"text/markdown": "**5.3x** faster"}, {})
    rows = [
        "| model | 1 |",
        "| :-- | --: |",
        "| teacher | 1.5 |",
        "| a\\|b | 2.0x (1.9 to 2.1) |",
    ]
    assert shown[1][0]["text/markdown"].split("\n") == rows
    assert shown[2] == ({"text/markdown": "| a | b | c |\n| :-- | :-: | --: |"}, {})


def test_what_has_a_name_is_glued_in_a_form_that_another_page_takes(shown):
    show.say("**5.3x** faster than `model`", name="gain")
    show.table([["<b>|", 1]], ["a", "b"], name="rungs")
    assert [glued(*output) for output in shown] == [
        [],
        [("gain", {"text/plain": "5.3x faster than model"})],
        [],
        [("rungs", {"text/html": shown[3][0][show.GLUE_PREFIX + "text/html"]})],
    ]
    table = shown[3][0][show.GLUE_PREFIX + "text/html"]
    assert re.findall(r"<(t[hd]) style=\"text-align:(\w+)\">([^<]*)</t[hd]>", table) == [
        ("th", "left", "a"),
        ("th", "right", "b"),
        ("td", "left", "&lt;b&gt;|"),
        ("td", "right", "1"),
    ]


def test_a_table_refuses_ragged_rows_and_unknown_alignments(shown):
    with pytest.raises(ValueError, match=r"the row \['1'\] has 1 cells, but the header has 2"):
        show.table([[1]], ["a", "b"])
    for align in ("l", "lx", "lrr"):
        with pytest.raises(ValueError, match=f"align is '{align}'"):
            show.table([[1, 2]], ["a", "b"], align=align)
    assert shown == []


@pytest.mark.parametrize(
    ("value", "text"), [(5.25, "5.25"), (torch.tensor(3), "3"), ("int8", "int8"), (7, "7")]
)
def test_glue_emits_what_the_site_reads(shown, value, text):
    show.glue("speed", value)
    assert glued(*shown[0]) == [("speed", {"text/plain": text})]


@pytest.mark.parametrize("value", [float("nan"), math.inf, torch.tensor(-math.inf)])
def test_glue_refuses_what_cannot_be_quoted(shown, value):
    with pytest.raises(ValueError, match="only a finite number may be quoted"):
        show.glue("speed", value)
    assert shown == []


def test_a_named_figure_is_both_shown_and_glued(shown):
    show.figure(line(), alt="A line.", name="line")
    data, metadata = shown[0]
    assert glued(data, metadata) == [("line", data)]
    assert len(shown) == 1


def test_outside_a_notebook_the_text_is_printed(rc, capsys):
    show.say("five")
    show.glue("hidden", 1)
    show.figure(line(), alt="A line.")
    assert capsys.readouterr().out == "five\nFigure: A line.\n"


def test_machine_line_names_what_a_number_needs(shown):
    from types import SimpleNamespace

    machine = SimpleNamespace(name="Fast CPU", device="cpu", threads=2, torch="2.13.0")
    show.machine_line(machine, torch.bfloat16)
    text = shown[0][0]["text/markdown"]
    assert all(part in text for part in ("Fast CPU", "2 threads", "torch 2.13.0", "bfloat16"))
    machine.threads = 1
    show.machine_line(machine)
    assert "1 thread)" in shown[1][0]["text/markdown"]
    assert "float32" in shown[1][0]["text/markdown"]


# figure


def line():
    fig, ax = plt.subplots()
    ax.plot([1, 2, 3], [1, 4, 9])
    return fig


def test_a_figure_is_one_output_for_every_viewer(shown):
    show.figure(line(), alt='A "line" <b>')
    [(data, metadata)] = shown
    assert list(data) == [DRAWING, "image/png", "text/plain"]
    assert data[DRAWING].startswith('<figure class="gptlite-figure"')
    assert data["text/plain"] == 'Figure: A "line" <b>'
    assert metadata["image/png"]["alt"] == 'A "line" <b>'


def test_a_list_of_figures_is_one_output_and_all_are_closed(shown):
    before = set(plt.get_fignums())
    show.figure([line(), line(), line()], alt="Three lines.")
    [(data, _)] = shown
    assert data[DRAWING].count("<svg") == 3
    assert set(plt.get_fignums()) == before


@pytest.mark.parametrize("alt", ["", "  "])
def test_a_figure_needs_alt_text(shown, alt):
    fig = line()
    with pytest.raises(ValueError, match="alt is empty"):
        show.figure(fig, alt=alt)
    assert shown == []
    assert plt.fignum_exists(fig.number)
    plt.close(fig)


# in a real kernel


@pytest.mark.notebook
def test_in_a_kernel_each_thing_is_shown_once():
    cells = [
        "import matplotlib.pyplot as plt\nfrom gptlite import model, show",
        "show.style()\nfig, ax = plt.subplots()\nshow.figure(fig, alt='A frame.')",
        "show.show(model.causal_mask)\nshow.say('text')\nshow.glue('n', 1.5)",
    ]
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
    where = {"metadata": {"path": str(notebook_files.ROOT)}}
    NotebookClient(notebook, kernel_name="python3", resources=where, timeout=120).execute()
    kinds = [[sorted(output.data) for output in cell.outputs] for cell in notebook.cells]
    hidden = ["application/papermill.record/text/plain"]
    assert kinds == [
        [],
        [[DRAWING, "image/png", "text/plain"]],
        [["text/markdown"], ["text/markdown"], hidden],
    ]
