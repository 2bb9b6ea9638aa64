import itertools
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
    """The lines of a file from the one that contains `first` to the one that contains `last`."""
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


def line(label="time <ms> & more", color=None):
    fig, ax = plt.subplots()
    ax.plot([1, 2, 3], [1, 4, 9.123456], "o-", color=color, label="measured")
    ax.set_xlabel(label)
    ax.text(1, 5, "0.123456", color="black", weight="bold")
    ax.legend()
    return fig


def markup(shown):
    [(data, _)] = shown
    return data["text/html"]


def test_a_figure_is_one_described_drawing(shown):
    show.figure(line(), alt='A "line" <b>')
    html = markup(shown)
    assert html.startswith('<figure class="gptlite-figure"')
    assert html.endswith("</svg></figure>")
    assert html.count("<svg") == 1
    assert 'role="img" aria-label="A &quot;line&quot; &lt;b&gt;"' in html
    assert "time &lt;ms&gt; &amp; more" in html
    assert shown[0][0]["text/plain"] == 'Figure: A "line" <b>'
    import xml.etree.ElementTree as ET

    ET.fromstring(html)  # well-formed, so that no parser has to guess


@pytest.mark.parametrize("alt", ["", "  "])
def test_a_figure_needs_alt_text(shown, alt):
    fig = line()
    with pytest.raises(ValueError, match="alt is empty"):
        show.figure(fig, alt=alt)
    assert shown == []
    plt.close(fig)


@pytest.mark.parametrize("styled", [False, True])
def test_the_foreground_is_the_pages_colour_and_the_background_transparent(shown, styled):
    if styled:
        show.style()
    show.figure(line(color=show.COLORS["blue"]), alt="A line.")
    html = markup(shown)
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", html)) <= {
        show.COLORS["blue"].lower(),
        "#cccccc",
    }
    assert (
        styled or "#cccccc" in html
    )  # the legend's frame, grey on either page; it must not be filled
    assert (
        'fill="currentColor"' in html.split(">")[1]
    )  # of the root: what Matplotlib leaves without a fill is black
    assert "stroke: currentColor" in html
    assert not re.search(r"\bblack\b|\bwhite\b", html)


def test_nothing_of_the_drawing_reaches_the_rest_of_the_page(shown):
    show.figure(line(), alt="A line.")
    assert not re.search(r"<style|<script|<metadata|<!DOCTYPE|<\?xml|DejaVu", markup(shown))


def test_two_figures_share_no_id_and_every_reference_resolves(shown):
    for label in ("first", "second"):
        show.figure(line(label), alt="A line.")
    ids = [re.findall(r' id="([^"]+)"', data["text/html"]) for data, _ in shown]
    for (data, _), own in zip(shown, ids, strict=True):
        references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', data["text/html"]))
        assert references == set(own)
        assert len(own) == len(set(own)) > 0
    assert not set(ids[0]) & set(ids[1])


def test_the_same_figure_gives_the_same_bytes(shown):
    for _ in range(2):
        show.figure(line(), alt="A line.")
    assert shown[0] == shown[1]


def test_text_stays_text_and_numbers_in_it_keep_their_digits(shown):
    show.figure(line(), alt="A line.")
    html = markup(shown)
    assert ">0.123456</text>" in html
    coordinates = re.findall(r'(?:x|y)="([^"]*)"|translate\(([^)]*)\)| d="([^"]*)"', html)
    assert not re.search(r"\d\.\d{3}", " ".join("".join(groups) for groups in coordinates))


def test_a_picture_inside_a_figure_survives(shown):
    import base64

    fig, ax = plt.subplots()
    ax.imshow([[0, 1], [1, 0]])
    show.figure(fig, alt="A chessboard.")
    picture = re.search(r'href="data:image/png;base64,([^"]*)"', markup(shown))[1]
    assert base64.b64decode(picture, validate=True).startswith(b"\x89PNG")


def test_a_plain_figure_is_small(shown):
    show.style()
    show.figure(line(), alt="A line.")
    assert len(markup(shown)) < 12_000


def test_figure_leaves_matplotlib_as_it_was_and_closes_the_figure(shown):
    before, open_before = dict(mpl.rcParams), set(plt.get_fignums())
    fig = line()
    face = fig.get_facecolor(), fig.axes[0].get_facecolor()
    show.figure(fig, alt="A line.")
    assert dict(mpl.rcParams) == before
    assert set(plt.get_fignums()) == open_before
    assert (fig.get_facecolor(), fig.axes[0].get_facecolor()) == face


# colours


def linear(colour):
    """Linear red, green and blue of a colour such as #0072B2 (IEC 61966-2-1)."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def luminance(rgb):
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast(a, b):
    """WCAG 2.2's contrast ratio."""
    low, high = sorted(luminance(linear(colour)) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    """CIE L*a*b* of linear RGB under D65."""
    x = (0.4124 * rgb[0] + 0.3576 * rgb[1] + 0.1805 * rgb[2]) / 0.95047
    z = (0.0193 * rgb[0] + 0.1192 * rgb[1] + 0.9505 * rgb[2]) / 1.08883
    fx, fy, fz = (
        v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, luminance(rgb), z)
    )
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB
SIGHT = {
    "full": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
}


def test_contrast_is_wcags():
    assert contrast("#FFFFFF", "#000000") == pytest.approx(21)
    assert contrast("#FFFFFF", "#777777") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("name", show.COLORS)
@pytest.mark.parametrize("page", ["#FFFFFF", "#121212"])
def test_every_colour_stands_out_from_a_light_and_a_dark_page(name, page):
    assert contrast(show.COLORS[name], page) >= 3


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_are_told_apart(sight):
    def seen(colour):
        rgb = linear(colour)
        return lab(
            [
                min(1, max(0, sum(m * v for m, v in zip(row, rgb, strict=True))))
                for row in SIGHT[sight]
            ]
        )

    for a, b in itertools.combinations(show.COLORS, 2):
        assert math.dist(seen(show.COLORS[a]), seen(show.COLORS[b])) > 15, (
            a,
            b,
        )  # 2.3 is just noticeable


# in a real kernel


@pytest.mark.notebook
def test_in_a_kernel_each_thing_is_shown_once():
    cells = [
        "import matplotlib.pyplot as plt\nfrom gptlite import show\nfrom gptlite.model import causal_mask",
        "show.style()\nfig, ax = plt.subplots()\nax.plot([1, 2])\nshow.figure(fig, alt='A line.')",
        "show.show(causal_mask)\nshow.say('text')\nshow.glue('n', 1.5)",
    ]
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
    where = {"metadata": {"path": str(notebook_files.ROOT)}}
    NotebookClient(notebook, kernel_name="python3", resources=where, timeout=120).execute()
    kinds = [[sorted(output.data) for output in cell.outputs] for cell in notebook.cells]
    hidden = ["application/papermill.record/text/plain"]
    assert kinds == [
        [],
        [["text/html", "text/plain"]],
        [["text/markdown"], ["text/markdown"], hidden],
    ]
