"""Figures are small, described, readable on a phone, in the page's colours or on white."""

import base64
import io
import re
from xml.etree import ElementTree

import check_notebooks
import matplotlib as mpl
import matplotlib.pyplot as plt
import notebook_files
import pytest
from PIL import Image

from gptlite.colors import COLORS
from gptlite.figures import figure_html, figure_output, style
from gptlite.pictures import DRAWING


@pytest.fixture(autouse=True)
def _own_settings():
    """Matplotlib's own settings, whatever another test has set; put back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.use("agg")
        yield
        plt.close("all")


def line(label="time <ms> & more", color=None):
    fig, ax = plt.subplots()
    ax.plot([1, 2, 3], [1, 4, 9.123456], "o-", color=color, label="measured")
    ax.set_xlabel(label)
    ax.text(1, 5, "0.123456", color="black", weight="bold")
    ax.legend()
    return fig


def three(**options):
    """A figure of three panels in a row."""
    fig, axes = plt.subplots(1, 3, figsize=(8, 2.5), **options)
    for name, ax in zip(("left", "middle", "right"), axes, strict=True):
        ax.plot([1, 2], [1, 4])
        ax.set_title(name)
    return fig


def markup(fig=None, alt="A line."):
    return figure_html(line() if fig is None else fig, alt)


def picture(fig):
    """The PNG that a notebook stores, in its colours, and what the notebook says of it."""
    data, metadata = figure_output(fig, "A line.")
    png = base64.b64decode(data["image/png"], validate=True)
    return Image.open(io.BytesIO(png)).convert("RGB"), metadata["image/png"], len(png)


def drawings(html):
    """The <svg> elements, parsed."""
    return [
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    ]


def words(drawing):
    texts = drawing.iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts]


# the drawing


def test_a_figure_is_one_described_drawing():
    html = markup(alt='A "line" <b>')
    assert html.startswith('<figure class="gptlite-figure"')
    assert html.endswith("</svg></figure>")
    assert html.count("<svg") == 1
    assert 'role="img" aria-label="A &quot;line&quot; &lt;b&gt;"' in html
    assert "time &lt;ms&gt; &amp; more" in html
    ElementTree.fromstring(html)  # well-formed, so that no parser has to guess


@pytest.mark.parametrize("styled", [False, True])
def test_the_foreground_is_the_pages_colour_and_the_background_transparent(styled):
    if styled:
        style()
    html = markup(line(color=COLORS["blue"]))
    colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", html))
    assert colours <= {COLORS["blue"].lower(), "#cccccc"}
    # the legend's frame, grey on either page; it must not be filled
    assert styled or "#cccccc" in html
    # of the root: what Matplotlib leaves without a fill is black
    assert 'fill="currentColor"' in html.split(">")[1]
    assert "stroke: currentColor" in html
    assert not re.search(r"\bblack\b|\bwhite\b", html)


def test_nothing_of_the_drawing_reaches_the_rest_of_the_page():
    fig = line()
    fig.axes[0].set(xscale="log", yscale="log")
    html = markup(fig)
    assert not re.search(r"<style|<script|<metadata|<!DOCTYPE|<\?xml|DejaVu", html)


def test_two_figures_share_no_id_and_every_reference_resolves():
    pages = [markup(line(label)) for label in ("first", "second")]
    pages.append(markup(three()))
    ids = [re.findall(r' id="([^"]+)"', html) for html in pages]
    for html, own in zip(pages, ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)) == set(own)
        assert len(own) == len(set(own)) > 0
    assert len(set().union(*ids)) == sum(map(len, ids))


def test_the_same_figure_gives_the_same_bytes():
    assert figure_output(line(), "A line.") == figure_output(line(), "A line.")


def test_text_stays_text_and_numbers_in_it_keep_their_digits():
    html = markup()
    assert ">0.123456</text>" in html
    coordinates = re.findall(r'(?:x|y)="([^"]*)"|translate\(([^)]*)\)| d="([^"]*)"', html)
    assert not re.search(r"\d\.\d{3}", " ".join("".join(groups) for groups in coordinates))


def test_a_picture_inside_a_figure_survives():
    fig, ax = plt.subplots()
    ax.imshow([[0, 1], [1, 0]])
    inside = re.search(r'href="data:image/png;base64,([^"]*)"', markup(fig))[1]
    assert base64.b64decode(inside, validate=True).startswith(b"\x89PNG")


def test_a_figure_leaves_matplotlib_as_it_was():
    before, fig = dict(mpl.rcParams), three(layout="constrained")
    engine, face = fig.get_layout_engine(), (fig.get_facecolor(), fig.axes[0].get_facecolor())
    fig.axes[1].set_visible(False)
    markup(fig)
    assert dict(mpl.rcParams) == before
    assert (fig.get_facecolor(), fig.axes[0].get_facecolor()) == face
    assert fig.get_layout_engine() is engine
    assert [ax.get_visible() for ax in fig.axes] == [True, False, True]


def test_numbers_of_logarithmic_axes_are_plain_and_in_one_piece():
    style()
    fig, ax = plt.subplots()
    ax.loglog([1e-4, 1e4], [1, 100])
    [drawing] = drawings(markup(fig))
    assert {"0.0001", "0.01", "1", "100", "10000"} <= set(words(drawing))
    assert not list(drawing.iter("{http://www.w3.org/2000/svg}tspan"))


# its size


@pytest.mark.parametrize(("width", "points"), [(5.5, 11), (4, 8), (8, 6)])
def test_text_is_never_smaller_than_nine_pixels(width, points):
    fig, ax = plt.subplots(figsize=(width, 2))
    ax.text(0.5, 0.5, "small", size=points)
    ax.tick_params(labelsize=20)
    html = markup(fig)
    shown_at = int(re.search(r"min-width:(\d+)px", html)[1])
    wide = float(re.search(r'viewBox="0 0 ([\d.]+)', html)[1])
    assert shown_at * points / wide == pytest.approx(9, rel=0.01)
    assert shown_at >= 9 * wide / points


def test_at_the_default_width_the_default_text_fits_a_phone():
    style()
    fig, ax = plt.subplots()
    ax.loglog([1e-3, 1e3], [1, 10], label="a line")
    ax.set(title="title", xlabel="x", ylabel="y")
    ax.legend()
    assert int(re.search(r"min-width:(\d+)px", markup(fig))[1]) <= 328


def test_a_figure_without_text_has_no_least_width():
    fig, ax = plt.subplots()
    ax.axis("off")
    assert "min-width:0px" in markup(fig)


# panels


def test_the_columns_of_one_row_become_panels_under_one_description():
    html = markup(three(), alt="Three lines.")
    found = drawings(html)
    assert [[w for w in words(d) if w.isalpha()] for d in found] == [
        ["left"], ["middle"], ["right"],
    ]  # fmt: skip
    assert html.count("aria-label") == 1
    assert [d.get("aria-hidden") for d in found] == ["true"] * 3
    ElementTree.fromstring(html)


def test_panels_are_as_high_as_each_other_and_together_as_wide_as_the_figure():
    fig = three(layout="constrained")
    fig.axes[0].set_xlabel("one with a label")
    boxes = [[float(side) for side in d.get("viewBox").split()] for d in drawings(markup(fig))]
    assert len({height for *_, height in boxes}) == 1
    assert 0.9 * 8 * 72 < sum(width for _, _, width, _ in boxes) < 8 * 72


def test_every_panel_has_the_numbers_of_an_axis_that_all_share():
    for drawing in drawings(markup(three(sharey=True))):
        assert {"1", "2", "3", "4"} <= set(words(drawing))


def test_numbers_that_the_author_took_away_stay_away():
    fig = three()
    fig.axes[1].tick_params(labelleft=False, labelbottom=False)
    assert words(drawings(markup(fig))[1]) == ["middle"]


def test_a_bar_of_colours_and_a_second_axis_stay_with_their_panel():
    for layout in ("constrained", "none"):
        fig = three(layout=layout)
        image = fig.axes[0].imshow([[0, 1], [1, 0]])
        fig.colorbar(image, ax=fig.axes[0], label="bar")
        fig.axes[1].twinx().set_ylabel("second")
        found = [set(words(d)) & {"bar", "second"} for d in drawings(markup(fig))]
        assert found == [{"bar"}, {"second"}, set()], layout


def grid(*shape):
    return plt.subplots(*shape)[0]


def with_legend():
    fig = three()
    fig.legend(["a line"])
    return fig


def with_title():
    fig = three()
    fig.suptitle("title")
    return fig


def spanning():
    fig = plt.figure()
    rows = fig.add_gridspec(1, 3)
    fig.add_subplot(rows[0, :2])
    fig.add_subplot(rows[0, 2])
    return fig


@pytest.mark.parametrize(
    "make",
    [lambda: grid(2, 1), lambda: grid(2, 2), with_legend, with_title, spanning, plt.figure],
)
def test_a_figure_of_another_form_stays_whole(make):
    fig = make()
    if not fig.axes:
        fig.add_axes((0.1, 0.1, 0.8, 0.8))
    assert markup(fig).count("<svg") == 1


def test_a_list_of_figures_makes_panels_in_its_order():
    found = drawings(markup([line("first"), three(), line("last")], alt="All."))
    assert len(found) == 5
    assert "first" in words(found[0]) and "right" in words(found[3])
    assert "last" in words(found[4])
    assert markup([line()]) == markup(line())
    with pytest.raises(ValueError, match="fig is an empty list"):
        figure_html([], "Nothing.")


# the picture


def test_the_picture_is_opaque_on_white_and_has_two_pixels_for_each_of_the_page():
    image, said, _ = picture(line(color=COLORS["blue"]))
    drawing = markup(line(color=COLORS["blue"]))
    assert said["alt"] == "A line."
    assert image.size == pytest.approx((2 * said["width"], 2 * said["height"]), abs=2)
    assert said["width"] == pytest.approx(int(re.search(r'"width:(\d+)px', drawing)[1]), abs=1)
    colours = {colour: n for n, colour in image.getcolors(1 << 24)}
    corner = image.getpixel((0, 0))
    assert corner == (255, 255, 255) and max(colours, key=colours.get) == corner
    blue = tuple(int(COLORS["blue"][i : i + 2], 16) for i in (1, 3, 5))
    near = [c for c in colours if all(abs(a - b) <= 3 for a, b in zip(c, blue, strict=True))]
    assert sum(colours[c] for c in near) > 500
    assert min(sum(colour) for colour in colours) < 30  # text


def test_a_picture_of_panels_has_them_side_by_side_in_order():
    fig = three(layout="constrained")
    for ax, name in zip(fig.axes, ("blue", "red", "green"), strict=True):
        ax.set_facecolor(COLORS[name])
    image, said, _ = picture(fig)
    assert 760 < said["width"] < 850
    middle = [
        image.getpixel((int(x * image.width), image.height // 2)) for x in (0.25, 0.5, 0.8)
    ]
    assert [max(range(3), key=colour.__getitem__) for colour in middle] == [2, 0, 1]


def test_panels_that_are_too_wide_for_one_row_are_set_in_rows():
    one = picture(line())[1]
    whole = picture([line(), line(), line()])[1]
    assert whole["width"] == pytest.approx(one["width"], abs=1)
    assert whole["height"] == pytest.approx(3 * one["height"] + 32, abs=2)


def test_a_plain_figure_is_small():
    style()
    assert len(markup(line())) < 12_000
    assert picture(line())[2] < 25_000


def test_every_viewer_has_a_kind_of_output_to_show():
    data, _ = figure_output(line(), "A line.")
    assert list(data) == [DRAWING, "image/png", "text/plain"]
    assert data["text/plain"] == "Figure: A line."
    assert data[DRAWING] == markup(line())


def test_a_drawing_is_not_compared_when_a_notebook_is_executed():
    """It follows Matplotlib's version; what stands in the two lists is written out there."""
    assert DRAWING in check_notebooks.NOT_COMPARED
    assert f'"{DRAWING}"' in (notebook_files.ROOT / "conftest.py").read_text()
