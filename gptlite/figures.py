"""Matplotlib's figures as drawings for any page and as pictures; the book's style of them."""

import html
import io
import math
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from gptlite.colors import COLORS
from gptlite.pictures import LEAST_TEXT, PIXELS, output, small_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def style() -> None:
    """Set the book's figure style for the rest of the notebook: COLORS in turn, a faint grid.

    At the default width, 5.5 inches, text of `font.size` has 9 pixels on a phone, so nothing
    may be smaller; in a narrower figure, or in a panel, it may. Logarithmic axes have plain
    numbers, because an exponent is smaller than its number.
    """
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update(
        {
            "figure.figsize": (5.5, 3.3),
            "figure.constrained_layout.use": True,
            "font.size": 11.5,
            "axes.titlesize": 11.5,
            "axes.titlelocation": "left",
            "axes.formatter.min_exponent": 5,
            "axes.prop_cycle": cycler(color=COLORS.values()),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": "black",
            "grid.alpha": 0.15,
            "lines.linewidth": 2,
            "lines.markersize": 5,
            "legend.frameon": False,
        }
    )


def figure_html(fig: "Figure | Sequence[Figure]", alt: str) -> str:
    """Return what the site shows of a figure, as HTML for any page; always the same bytes."""
    return _html([_drawing(svg.decode()) for svg in _panels(fig, "svg")], alt)


def figure_output(
    fig: "Figure | Sequence[Figure]", alt: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return data and metadata of the notebook's output that shows a figure in every viewer."""
    return output(figure_html(fig, alt), small_png(_panels(fig, "png")), alt)


def _panels(fig: "Figure | Sequence[Figure]", form: str) -> list[bytes]:
    """Return the panels of all figures, in order, as files of the form."""
    figures = fig if isinstance(fig, Sequence) else [fig]
    if not figures:
        raise ValueError("fig is an empty list, but must hold at least one figure.")
    return [panel for each in figures for panel in _saved(each, form)]


def _saved(fig: "Figure", form: str) -> list[bytes]:
    """Return the panels of one figure as files: its columns, cut apart, or all of it."""
    from matplotlib.transforms import Bbox

    columns = _columns(fig)
    for column in columns[1:]:  # on a phone none stands beside another
        for ax in column:
            if ax.get_shared_y_axes().joined(ax, columns[0][0]):
                ax.tick_params(axis="y", which="both", labelleft=True)
    engine = fig.get_layout_engine()
    fig.draw_without_rendering()
    whole = fig.get_tightbbox()
    boxes = []
    for column in columns:
        around = [ax.get_tightbbox() for ax in column]  # None of what is invisible
        box = Bbox.union([box for box in around if box is not None])
        box = box.transformed(fig.dpi_scale_trans.inverted())
        boxes.append(Bbox.from_extents(box.x0, whole.y0, box.x1, whole.y1))
    fig.set_layout_engine("none")  # else it would be laid out anew without the hidden columns
    try:
        if not columns:
            return [_file(fig, form, whole)]
        return [
            _file(fig, form, box, hidden=[ax for ax in fig.axes if ax not in column])
            for column, box in zip(columns, boxes, strict=True)
        ]
    finally:
        fig.set_layout_engine(engine or "none")


def _columns(fig: "Figure") -> "list[list[Axes]]":
    """Return the axes of each column, if the figure has one row of several; else nothing.

    What stands in no column itself, such as a bar of colours, goes with the nearest. A figure
    with a title or legend of its own is not taken apart.
    """
    seen = [ax for ax in fig.axes if ax.get_visible()]
    specs = {ax: ax.get_subplotspec() for ax in seen}
    places = {ax: s.get_topmost_subplotspec() for ax, s in specs.items() if s is not None}
    own = [*fig.legends, *fig.texts, *fig.lines, *fig.patches, *fig.artists, *fig.subfigs]
    grids = {place.get_gridspec() for place in places.values()}
    one_row = len(grids) == 1 and all(grid.nrows == 1 for grid in grids)
    if own or not one_row or any(len(place.colspan) > 1 for place in places.values()):
        return []
    columns: dict[int, list[Axes]] = {}
    for ax, place in sorted(places.items(), key=lambda item: item[1].colspan.start):
        columns.setdefault(place.colspan.start, []).append(ax)
    for ax in seen:
        if ax not in places:
            x = ax.get_position().x0
            near = min(columns.values(), key=lambda c: abs(c[0].get_position().x1 - x))
            near.append(ax)
    return list(columns.values()) if len(columns) > 1 else []


def _file(fig: "Figure", form: str, box: Any, hidden: "Sequence[Axes]" = ()) -> bytes:
    """Return what lies in the box (inches) as a file, the same bytes each time.

    Text in SVG stays text, and nothing is behind it; a PNG is on white.
    """
    import matplotlib as mpl

    options: dict[str, dict[str, Any]] = {
        "svg": {"transparent": True, "metadata": {"Date": None}},
        "png": {"facecolor": "white", "dpi": 96 * PIXELS},
    }
    seen = [ax for ax in hidden if ax.get_visible()]
    file = io.BytesIO()
    try:
        for ax in seen:
            ax.set_visible(False)
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gptlite"}):
            fig.savefig(file, format=form, bbox_inches=box.padded(0.02), **options[form])
    finally:
        for ax in seen:
            ax.set_visible(True)
    return file.getvalue()


class _Drawing(NamedTuple):
    """What stands inside an <svg>, and its sides in points."""

    body: str
    width: float
    height: float

    def element(self, attributes: str, style: str) -> str:
        """Return the <svg>."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {attributes} '
            f'viewBox="0 0 {self.width:.2f} {self.height:.2f}" fill="currentColor" '
            f'stroke-linejoin="round" style="{style};height:auto">{self.body}</svg>'
        )

    def natural(self) -> int:
        """Return its width in pixels where there is room."""
        return round(self.width * 4 / 3)

    def least(self) -> int:
        """Return the width in pixels at which the smallest text can still be read."""
        sizes = re.findall(r"font(?:-size)?: (?:[a-z]+ )*([\d.]+)px", self.body)
        return math.ceil(LEAST_TEXT * self.width / min(map(float, sizes), default=math.inf))


def _html(drawings: list[_Drawing], alt: str) -> str:
    """Return drawings as one described figure: side by side, or, where narrow, stacked.

    Where even one does not fit, it scrolls in its own box.
    """
    if not alt.strip():
        raise ValueError("alt is empty, but must say in a sentence what the figure shows.")
    image, unseen = f'role="img" aria-label="{html.escape(alt)}"', 'aria-hidden="true"'
    if len(drawings) == 1:
        [one] = drawings
        width = f"width:{one.natural()}px;min-width:{one.least()}px;max-width:100%"
        content = one.element(image, width)
    else:
        # a line is broken where a panel would have less than four fifths of its width; on a
        # phone no two stand side by side
        panels = [
            f'<div style="flex:{one.natural()} 1 {max(0.8 * one.natural(), 160):.0f}px;'
            f'max-width:{one.natural()}px;min-width:{one.least()}px">'
            f"{one.element(unseen, 'display:block;width:100%')}</div>"
            for one in drawings
        ]
        flow = "display:flex;flex-wrap:wrap;align-items:flex-end;gap:0.5em 1em"
        content = f'<div {image} style="{flow}">{"".join(panels)}</div>'
    box = 'class="gptlite-figure" style="margin:1em 0;overflow-x:auto"'
    return f"<figure {box}>{content}</figure>"


# a drawing's <style> would reach every other drawing of the page; its rules become attributes
# of the root instead
_DOCUMENT = re.compile(
    r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", re.DOTALL
)
_LEGEND_BOX = re.compile(
    r'(id="legend_\d+">\s*<g id="patch_\d+">\s*<path d="[^"]*" style=")fill: #ffffff'
)


_NUMBER = re.compile(r"<text>((?:<tspan [^>]*>[\d.−]+</tspan>)+)</text>")


def _drawing(svg: str) -> _Drawing:
    """Return the content of Matplotlib's document, small and harmless to a page around it."""
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    assert size is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = _LEGEND_BOX.sub(r"\1fill: none", _DOCUMENT.sub("", body))
    body = re.sub(r"<[^>]+>", lambda tag: _tidy(tag[0]), body)
    body = _NUMBER.sub(_in_one_piece, re.sub(r">\s+<", "><", body.strip()))
    # the transparent background of the figure and of its axes
    body = re.sub(r'<path d="[^"]*" style="fill: none"/>', "", body)
    return _Drawing(_unique_ids(body), float(size[1]), float(size[2]))


def _in_one_piece(number: re.Match[str]) -> str:
    """Return a number of a logarithmic axis as one text, not as digits set in another font."""
    first = re.search(r' y="([^" ]*)[^"]*" style="([^"]*)"', number[0])
    assert first is not None
    digits = re.sub("<[^>]*>", "", number[1])
    return f'<text y="{first[1]}" style="{first[2]}">{digits}</text>'


def _tidy(tag: str) -> str:
    """Return a tag with the text colour and the font of the page, and short numbers."""
    if "base64," in tag:
        return tag.replace("\n", "").replace("xlink:href", "href")
    tag = re.sub(r"\s+", " ", tag).replace("xlink:href", "href")
    tag = tag.replace("#000000", "currentColor")
    tag = re.sub(r"font-family: (?:(?:'[^']*', )*sans-serif|'DejaVu Sans')(?:; )?", "", tag)
    # in the `font:` of Matplotlib before 3.10
    tag = re.sub(r"(?:'[^']*', )+sans-serif", "sans-serif", tag)
    return re.sub(
        r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag
    )


def _unique_ids(body: str) -> str:
    """Return the drawing with ids of its own, those that nothing refers to dropped."""
    prefix = "f" + sha256(body.encode()).hexdigest()[:8]
    used = dict.fromkeys(re.findall(r'(?:url\(|href=")#([\w.-]+)', body))
    names = {old: f"{prefix}-{i}" for i, old in enumerate(used)}
    body = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", body
    )
    return re.sub(r'(url\(|href=")#([\w.-]+)', lambda m: f"{m[1]}#{names[m[2]]}", body)
