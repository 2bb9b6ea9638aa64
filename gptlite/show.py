"""What a chapter puts on the page: an object's real source, sentences, tables and figures."""

import html
import inspect
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlite.colors import COLORS, shades
from gptlite.figures import figure_output, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gptlite.roofline import Machine

__all__ = [
    "COLORS",
    "figure",
    "glue",
    "machine_line",
    "say",
    "shades",
    "show",
    "style",
    "table",
]

# myst-nb hides an output of this type and keeps it for other pages
GLUE_PREFIX = "application/papermill.record/"


def show(*objects: Any) -> None:
    """Display the source of functions, classes, methods or modules, or a file, as one listing.

    Tag the cell `nbval-check-output`: the tests then compare the listing with the source.
    """
    _display({"text/markdown": "\n\n".join(_listing(obj) for obj in objects)})


def say(text: str, name: str | None = None) -> None:
    """Display `text` as Markdown; under `name`, pages may quote it, without its markup."""
    _display({"text/markdown": text})
    if name is not None:
        glue(name, re.sub(r"[*`]", "", text))


def table(
    rows: Iterable[Sequence[Any]],
    header: Sequence[Any],
    align: str | None = None,
    name: str | None = None,
) -> None:
    """Display a Markdown table; under `name`, pages without code may show it too.

    They do so by ```{glue} name with its `:doc:`. `align` has l, r or c for each column; if
    None, the first stands to the left and the others to the right.
    """
    align = "l" + "r" * (len(header) - 1) if align is None else align
    if len(align) != len(header) or set(align) - set("lrc"):
        raise ValueError(
            f"align is {align!r}, but must have one of l, r and c for each of"
            f" {len(header)} columns."
        )
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(
                f"the row {line} has {len(line)} cells, but the header has {len(header)}."
            )
    rule = [{"l": ":--", "r": "--:", "c": ":-:"}[letter] for letter in align]
    first, *others = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    markdown = ("| " + " | ".join(line) + " |" for line in (first, rule, *others))
    _display({"text/markdown": "\n".join(markdown)})
    if name is not None:
        _display({GLUE_PREFIX + "text/html": _html_table(lines, align)}, name, GLUE_PREFIX)


def glue(name: str, value: Any) -> None:
    """Keep a number or a text under `name`, unseen here, for other pages.

    They quote it as {glue:text}`notebook.ipynb::name:.1f`.
    """
    if hasattr(value, "item"):  # a tensor's or an array's one number
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, but only a finite number may be quoted.")
    _display({GLUE_PREFIX + "text/plain": str(value)}, name, GLUE_PREFIX)


def figure(fig: "Figure | Sequence[Figure]", alt: str, name: str | None = None) -> None:
    """Display a Matplotlib figure once, or a list of them as panels, in every viewer.

    Viewers of notebooks show a PNG on white. The site shows SVG: black turns into the page's
    text colour, light or dark, and nothing is behind it. `alt` says in a sentence what all of
    it shows, for whoever cannot see it. Under `name`, other pages may show it. `fig` is closed.

    The panels of a list, and the columns of `plt.subplots(1, n)`, stand side by side where
    there is room, and below each other on a phone; so each has the numbers at its axis, and a
    legend belongs into one of the axes. A figure with a legend or title of its own, or with
    several rows, is not cut. On a phone text has at least 9 pixels, if need be by scrolling:
    it needs 11 points in a figure 5.5 inches wide, 8 in a figure or panel of 4.
    """
    import matplotlib.pyplot as plt

    data, metadata = figure_output(fig, alt)
    for each in fig if isinstance(fig, Sequence) else [fig]:
        plt.close(each)  # else the notebook's own backend would show it a second time
    _display(data, name, metadata=metadata)


def machine_line(machine: "Machine", dtype: Any = "float32") -> None:
    """Display one line that names the processor, its threads, torch and the number format."""
    dtype = str(dtype).removeprefix("torch.")
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    where = f"{machine.name} ({machine.device}, {threads})"
    say(f"*Measured on {where}, torch {machine.torch}, {dtype}.*")


def _html_table(lines: list[list[str]], align: str) -> str:
    """Return the lines, a header first, as HTML: the one form of a table that myst-nb moves."""
    sides = [{"l": "left", "r": "right", "c": "center"}[letter] for letter in align]

    def row(tag: str, line: list[str]) -> str:
        cells = zip(sides, map(html.escape, line), strict=True)
        marked = (f'<{tag} style="text-align:{side}">{cell}</{tag}>' for side, cell in cells)
        return f"<tr>{''.join(marked)}</tr>"

    head, body = row("th", lines[0]), "".join(row("td", line) for line in lines[1:])
    return f'<table class="table"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _listing(obj: Any) -> str:
    """Return the source of one object, as it stands in its file, in a fence it cannot end."""
    if isinstance(obj, Path):
        language = {".h": "cpp"}.get(obj.suffix, obj.suffix.lstrip("."))
        return _fenced(obj.read_text(encoding="utf-8"), language)
    code: Any = obj
    if isinstance(obj, property):
        code = obj.fget
    elif isinstance(obj, cached_property):
        code = obj.func
    try:
        return _fenced(textwrap.dedent(inspect.getsource(code)), "python")
    except (TypeError, OSError):
        raise TypeError(
            f"{obj!r} has no Python source; show takes functions, classes, methods and modules"
            " that have one."
        ) from None


def _fenced(source: str, language: str) -> str:
    source = source.rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", source)), default=0))
    return f"{fence}{language}\n{source}\n{fence}"


def _display(
    data: dict[str, Any],
    name: str | None = None,
    prefix: str = "",
    metadata: dict[str, Any] | None = None,
) -> None:
    """Hand an output to the notebook, with myst-nb's metadata if it has a name.

    Outside a notebook, print its text.
    """
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        text = data.get("text/plain", data.get("text/markdown", ""))
        print(text, end="" if prefix else "\n")
        return
    if name:
        scrapbook = {"scrapbook": {"name": name, "mime_prefix": prefix}}
        metadata = {**(metadata or {}), **scrapbook}
    display(data, raw=True, metadata=metadata or {})
