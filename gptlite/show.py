"""What a chapter puts on the page: an object's real source, computed sentences, tables and figures."""

import html
import inspect
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlite.colors import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gptlite.roofline import Machine

GLUE_PREFIX = "application/papermill.record/"  # myst-nb hides an output of this type and keeps it for other pages


def show(*objects: Any) -> None:
    """Display the source of functions, classes, methods or modules, or the text of a file, as one highlighted listing.

    Tag the cell `nbval-check-output`: the tests then compare the listing with the source as it is.
    """
    _display({"text/markdown": "\n\n".join(_listing(obj) for obj in objects)})


def say(text: str, name: str | None = None) -> None:
    """Display `text` as Markdown; under `name`, pages without code may quote it, without its markup."""
    _display({"text/markdown": text})
    if name is not None:
        glue(name, re.sub(r"[*`]", "", text))


def table(
    rows: Iterable[Sequence[Any]],
    header: Sequence[Any],
    align: str | None = None,
    name: str | None = None,
) -> None:
    """Display a Markdown table; under `name`, pages without code may show it too: ```{glue} name with its `:doc:`.

    `align` has l, r or c for each column; if None, the first stands to the left and the others to the right.
    """
    align = "l" + "r" * (len(header) - 1) if align is None else align
    if len(align) != len(header) or set(align) - set("lrc"):
        raise ValueError(
            f"align is {align!r}, but must have one of l, r and c for each of {len(header)} columns."
        )
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(
                f"the row {line} has {len(line)} cells, but the header has {len(header)}."
            )
    rule = [{"l": ":--", "r": "--:", "c": ":-:"}[letter] for letter in align]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    _display(
        {
            "text/markdown": "\n".join(
                "| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:])
            )
        }
    )
    if name is not None:
        _display({GLUE_PREFIX + "text/html": _html_table(lines, align)}, name, GLUE_PREFIX)


def glue(name: str, value: Any) -> None:
    """Keep a number or a text under `name`, unseen here, for other pages: {glue:text}`notebook.ipynb::name:.1f`."""
    value = (
        value.item() if hasattr(value, "item") else value
    )  # a tensor's or an array's one number
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, but only a finite number may be quoted.")
    _display({GLUE_PREFIX + "text/plain": str(value)}, name, GLUE_PREFIX)


def figure(fig: "Figure", alt: str, name: str | None = None) -> None:
    """Display a Matplotlib figure once, as inline SVG in the page's own text colour, and close it.

    `alt` says in a sentence what the figure shows, for whoever cannot see it. Black turns into the text colour of the
    page, light or dark, and the background is transparent. Under `name`, other pages of the book may show it too.
    """
    import matplotlib.pyplot as plt

    data = {"text/html": figure_html(fig, alt), "text/plain": f"Figure: {alt}"}
    plt.close(fig)  # else the notebook's own backend would show it a second time
    _display(data, name)


def figure_html(fig: "Figure", alt: str) -> str:
    """What `figure` displays, as HTML for any page; the same bytes for the same figure."""
    if not alt.strip():
        raise ValueError("alt is empty, but must say in a sentence what the figure shows.")
    return f'<figure class="gptlite-figure" style="margin:1em 0">{_inline_svg(_svg(fig), alt)}</figure>'


def style() -> None:
    """Set the book's figure style for the rest of the notebook: COLORS in turn, a faint grid, no box."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update(
        {
            "figure.figsize": (
                5.5,
                3.3,
            ),  # inches; at the width of a phone the text is still about 9 pixels high
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
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


def machine_line(machine: "Machine", dtype: Any = "float32") -> None:
    """Display one line that names the processor, its threads, torch and the number format of what follows."""
    dtype = str(dtype).removeprefix("torch.")
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    say(
        f"*Measured on {machine.name} ({machine.device}, {threads}), torch {machine.torch}, {dtype}.*"
    )


def _html_table(lines: list[list[str]], align: str) -> str:
    """The lines, a header first, as HTML: of all that myst-nb brings to another page, the one form a table has."""
    sides = [{"l": "left", "r": "right", "c": "center"}[letter] for letter in align]

    def row(tag: str, line: list[str]) -> str:
        cells = zip(sides, map(html.escape, line), strict=True)
        return (
            "<tr>"
            + "".join(
                f'<{tag} style="text-align:{side}">{cell}</{tag}>' for side, cell in cells
            )
            + "</tr>"
        )

    body = "".join(row("td", line) for line in lines[1:])
    return f'<table class="table"><thead>{row("th", lines[0])}</thead><tbody>{body}</tbody></table>'


def _listing(obj: Any) -> str:
    """The source of one object, as it stands in its file, in a fence that it cannot end."""
    if isinstance(obj, Path):
        language = {".h": "cpp"}.get(obj.suffix, obj.suffix.lstrip("."))
        return _fenced(obj.read_text(encoding="utf-8"), language)
    code = (
        obj.fget
        if isinstance(obj, property)
        else obj.func
        if isinstance(obj, cached_property)
        else obj
    )
    try:
        return _fenced(textwrap.dedent(inspect.getsource(code)), "python")
    except (TypeError, OSError):
        raise TypeError(
            f"{obj!r} has no Python source; show takes functions, classes, methods and modules that have one."
        ) from None


def _fenced(source: str, language: str) -> str:
    source = source.rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", source)), default=0))
    return f"{fence}{language}\n{source}\n{fence}"


def _svg(fig: "Figure") -> str:
    """The figure as Matplotlib writes it, the same bytes each time, its text kept as text."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gptlite"}):
        fig.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    return buffer.getvalue().decode()


# a drawing's <style> would reach every other drawing of the page; its rules become attributes of the root instead
_DOCUMENT = re.compile(
    r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", re.DOTALL
)
_LEGEND_BOX = re.compile(
    r'(id="legend_\d+">\s*<g id="patch_\d+">\s*<path d="[^"]*" style=")fill: #ffffff'
)


def _inline_svg(svg: str, alt: str) -> str:
    """Matplotlib's SVG document as one element for an HTML page: small, harmless to its surroundings, described."""
    width, height = (
        float(size)
        for size in re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups()
    )
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = _DOCUMENT.sub("", body)
    body = _LEGEND_BOX.sub(r"\1fill: none", body)
    body = re.sub(r"<[^>]+>", lambda tag: _tidy(tag[0]), body)
    body = re.sub(r">\s+<", "><", body.strip())
    body = re.sub(
        r'<path d="[^"]*" style="fill: none"/>', "", body
    )  # the transparent background of figure and axes
    body = _unique_ids(body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(alt)}" '
        f'viewBox="0 0 {width:.2f} {height:.2f}" fill="currentColor" stroke-linejoin="round" '
        f'style="width:{width * 4 / 3:.0f}px;max-width:100%;height:auto">{body}</svg>'
    )


def _tidy(tag: str) -> str:
    """One tag with black as the page's text colour, the page's own font, and coordinates to a hundredth of a point."""
    if "base64," in tag:
        return tag.replace("\n", "").replace("xlink:href", "href")
    tag = (
        re.sub(r"\s+", " ", tag)
        .replace("xlink:href", "href")
        .replace("#000000", "currentColor")
    )
    tag = re.sub(r"font-family: (?:'[^']*', )*sans-serif(?:; )?", "", tag)
    tag = re.sub(
        r"(?:'[^']*', )+sans-serif", "sans-serif", tag
    )  # in the `font:` of Matplotlib before 3.10
    return re.sub(
        r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag
    )


def _unique_ids(body: str) -> str:
    """The ids that something refers to, made the figure's own by a digest of its content; the others dropped."""
    prefix = "f" + sha256(body.encode()).hexdigest()[:8]
    used = dict.fromkeys(re.findall(r'(?:url\(|href=")#([\w.-]+)', body))
    names = {old: f"{prefix}-{i}" for i, old in enumerate(used)}
    body = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", body
    )
    return re.sub(r'(url\(|href=")#([\w.-]+)', lambda m: f"{m[1]}#{names[m[2]]}", body)


def _display(data: dict[str, str], name: str | None = None, prefix: str = "") -> None:
    """Hand an output to the notebook, with myst-nb's metadata if it has a name; outside a notebook, print its text."""
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        print(data.get("text/plain", data.get("text/markdown", "")), end="" if prefix else "\n")
    else:
        display(
            data,
            raw=True,
            metadata={"scrapbook": {"name": name, "mime_prefix": prefix}} if name else {},
        )
