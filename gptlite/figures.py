"""Matplotlib's figures as drawings for any page and as pictures; the book's style of them."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptlite.colors import COLORS
from gptlite.pictures import PIXELS, drawing, html_figure, output, small_png

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
    return html_figure([drawing(svg.decode()) for svg in _panels(fig, "svg")], alt)


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
