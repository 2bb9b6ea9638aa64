"""Drawings of computation graphs, as Graphviz (https://graphviz.org) lays them out."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from gptlite.colors import COLORS
from gptlite.onnx_export.graphs import Graph, read
from gptlite.pictures import LEAST_TEXT, PIXELS, output, small_png

# the colour of an operator's box, None being that of the page's text, and what it means
KINDS: dict[str, tuple[str | None, str]] = {
    "matmul": (COLORS["blue"], "product of matrices"),
    "normalise": (COLORS["green"], "along an axis"),
    "elementwise": (COLORS["sky"], "element by element"),
    "shape": (None, "moves or makes numbers"),
    "cast": (COLORS["orange"], "changes the number format"),
    "random": (COLORS["red"], "random"),
    "control": (COLORS["red"], "branch or loop"),
    "fused": (COLORS["purple"], "fused"),
    "other": (None, "other"),
}
# the layout is made for Helvetica; a page's own font may be wider, so that it is drawn smaller
_FONT_SCALE = 0.86


class Drawing(str):
    """A drawing as HTML for any page; as a notebook's output, a PNG that every viewer shows."""

    graph: Graph
    alt: str
    heading: str | None

    def __repr__(self) -> str:
        # what a notebook stores as the output's text: else all of the HTML once more
        return f"Figure: {self.alt}"

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return data and metadata of the output, when IPython asks for them."""
        scale = f"-Gdpi={72 * PIXELS}"  # a point of the drawing is a pixel of the page
        below = _label(self.graph, self.heading)
        picture = _render(self.graph, "png", scale, below=below)
        return output(str(self), small_png([picture]), self.alt)


def draw_graph(source: Any, alt: str, title: str | None = None) -> Drawing:
    """Return a drawing of the graph: as a cell's last line, or by `display`, it is shown.

    It is inline SVG for any page of HTML, the same bytes for the same graph; a notebook stores
    a PNG with it. `alt` says in a sentence what the drawing shows; under it stand `title` and
    what the colours mean. Its smallest text is never under 9 pixels: where the page is too
    narrow, the figure scrolls. Needs Graphviz or graphviz-pure.
    """
    if not alt.strip():
        raise ValueError("alt is empty, but must say in a sentence what the drawing shows.")
    graph = read(source)
    svg = _inline_svg(_render(graph, "svg", "-Gbgcolor=transparent").decode(), alt)
    legend = [_key(color, meaning) for color, meaning in _legend(graph)]
    caption = " ".join(([f"{html.escape(title)}<br>"] if title else []) + legend)
    drawing = Drawing(
        '<figure class="gptlite-figure" style="margin:1em 0;overflow-x:auto">'
        f"{svg}<figcaption>{caption}</figcaption></figure>"
    )
    drawing.graph, drawing.alt, drawing.heading = graph, alt, title
    return drawing


def _key(color: str | None, meaning: str) -> str:
    """One entry of the legend as HTML: a filled square in a colour, or an empty one."""
    mark, color = ("■", color) if color else ("□", "inherit")
    square = f'<span aria-hidden="true" style="color:{color}">{mark}</span>'
    return f'<span style="white-space:nowrap">{square} {meaning}</span>'


def _legend(graph: Graph) -> list[tuple[str | None, str]]:
    """Return the colours that occur in the graph, each with what it means."""
    kinds = {node.kind for node in graph.nodes}
    return [KINDS[kind] for kind in KINDS if kind in kinds]


def _label(graph: Graph, title: str | None) -> str:
    """Return title and meaning of the colours, to stand under a picture, for Graphviz."""
    lines = [html.escape(line) for line in textwrap.wrap(title or "", 60)]
    lines += [
        f'<font color="{color}">■</font> {meaning}' if color else f"□ {meaning}"
        for color, meaning in _legend(graph)
    ]
    rows = "".join(f'<tr><td align="left">{line}</td></tr>' for line in lines)
    table = f'<table border="0" cellspacing="0">{rows}</table>'
    return f"labelloc=b label=<{table}>" if rows else ""


def _dot(graph: Graph, below: str) -> str:
    """Return the graph in Graphviz's language; ids are the names of operators and values."""
    lines = [
        "digraph {pad=0.1 ranksep=0.22 nodesep=0.2 fontname=Helvetica fontsize=13 labeljust=l",
        'node [shape=box style="rounded,filled" fontname=Helvetica fontsize=14 height=0.3',
        'width=0.6 margin="0.1,0.05" penwidth=1.2]',
        'edge [fontname=Helvetica fontsize=12 arrowsize=0.6 penwidth=0.9 color="#000000a0"]',
        *(
            _oval(f"i{i}", value, graph.shapes.get(value, ""))
            for i, value in enumerate(graph.inputs)
        ),
        *_frames(graph, list(range(len(graph.nodes))), 0),
        *(_oval(f"o{i}", value) for i, value in enumerate(graph.outputs)),
    ]
    makers = {value: f"i{i}" for i, value in enumerate(graph.inputs)}
    makers |= {value: f"n{i}" for i, node in enumerate(graph.nodes) for value in node.outputs}
    readers = [
        (f"n{i}", value)
        for i, node in enumerate(graph.nodes)
        for value in dict.fromkeys(node.inputs)
    ]
    for reader, value in readers + [(f"o{i}", value) for i, value in enumerate(graph.outputs)]:
        if value in makers:
            # an input's own oval has it
            shape = graph.shapes.get(value, "") if value not in graph.inputs else ""
            label = f"  {shape} " if shape else ""
            lines.append(
                f"{makers[value]} -> {reader} [id={_quoted(value)} label={_quoted(label)}]"
            )
    return "\n".join([*lines, below, "}"])


def _frames(graph: Graph, members: list[int], depth: int) -> list[str]:
    """Return the boxes of operators of one module, in a frame for each module inside.

    The operators' modules are the same up to `depth`.
    """
    groups: dict[str, list[int]] = {}
    lines = []
    for i in members:
        if len(graph.nodes[i].module) > depth:
            groups.setdefault(graph.nodes[i].module[depth], []).append(i)
        else:
            lines.append(_box(graph, i, depth))
    for name, group in groups.items():
        for part in _parts(graph, group):
            if len(part) == 1:
                lines.append(_box(graph, part[0], depth))
            else:
                style = 'style="rounded,filled" color="#00000060" fillcolor="#00000008"'
                lines.append(
                    f"subgraph cluster{depth}_{part[0]} {{label={_quoted(name)} {style}"
                )
                lines += [*_frames(graph, part, depth + 1), "}"]
    return lines


def _parts(graph: Graph, members: list[int]) -> list[list[int]]:
    """Return the members in parts that hang together through values of their own.

    So a module that is called twice has two frames.
    """
    parts: list[list[int]] = []
    for i in members:  # each after those whose values it reads
        reads = set(graph.nodes[i].inputs)
        joined = [
            part
            for part in parts
            if any(reads.intersection(graph.nodes[j].outputs) for j in part)
        ]
        parts = [part for part in parts if part not in joined] + [
            sorted([i, *(j for part in joined for j in part)])
        ]
    return sorted(parts)


def _box(graph: Graph, i: int, depth: int) -> str:
    """Return an operator: name, modules that no frame shows, shapes of the weights it reads."""
    node = graph.nodes[i]
    shapes = [graph.shapes.get(value, "") for value in node.inputs if value in graph.constants]
    # of more than one number; what a shape operator reads as a list is no weight
    shapes = [shape for shape in shapes if not {*shape.split("×")} <= {"1", "scalar", ""}]
    weights = ", ".join(shape for shape in shapes if "×" in shape or node.kind != "shape")
    label = filter(None, [node.op, "/".join(node.module[depth:]), weights and f"W {weights}"])
    color = KINDS[node.kind][0]
    edge, tint = (color, f"{color}22") if color else ("#00000090", "#0000000c")
    attributes = f'id={_quoted(node.name or node.op)} color="{edge}" fillcolor="{tint}"'
    return f"n{i} [label={_quoted(*label)} {attributes}]"


def _oval(name: str, value: str, shape: str = "") -> str:
    label = _quoted(*filter(None, [value, shape]))
    look = 'shape=ellipse style="" color="#000000a0" margin="0.05,0.02"'
    return f"{name} [id={_quoted(value)} label={label} {look}]"


def _quoted(*lines: str) -> str:
    return json.dumps("\n".join(lines), ensure_ascii=False)


def _render(graph: Graph, form: str, *options: str, below: str = "") -> bytes:
    """Return what Graphviz makes of the graph: the system's, or the PyPI package's."""
    beside = shutil.which("graphviz-pure", path=Path(sys.executable).parent)
    program = shutil.which("dot") or beside or shutil.which("graphviz-pure")
    if program is None:
        raise ImportError(
            "drawing a graph needs Graphviz: pip install graphviz-pure, or install Graphviz"
            " itself."
        )
    command, dot = [program, f"-T{form}", *options], _dot(graph, below).encode()
    run = subprocess.run(command, input=dot, capture_output=True)
    if run.returncode or not run.stdout:
        reason = run.stderr.decode(errors="replace").strip() or "no reason given"
        raise OSError(f"{program} drew nothing: {reason}.")
    return run.stdout


def _inline_svg(svg: str, alt: str) -> str:
    """Return Graphviz's document as one described element, in a page's text colour and font."""
    box = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg)
    assert box is not None
    width, height = float(box[1]), float(box[2])
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    # titles are shown under the pointer: names instead of Graphviz's own, and none for a frame
    body = re.sub(
        r'<g id="([^"]*)" class="(node|edge)">\s*<title>.*?</title>',
        r'<g class="\2"><title>\1</title>',
        body,
    )
    body = re.sub(r'(class="(?:graph|cluster)"[^>]*>)\s*<title>.*?</title>', r"\1", body)
    body = re.sub(
        r'(class="node"><title>[^<]*</title>\s*<path[^>]*>\s*<text)',
        r'\1 font-weight="bold"',
        body,
    )
    body = re.sub(r' (?:id|class|font-family|xml:space)="[^"]*"', "", body)
    body = re.sub(r'"(?:black|#000000)"', '"currentColor"', body)
    body = re.sub(
        r'font-size="([\d.]+)"',
        lambda size: f'font-size="{_FONT_SCALE * float(size[1]):.3g}"',
        body,
    )
    body = body.replace("&#160;", " ")
    body = re.sub(r">\s+|\s+<", lambda space: space[0].strip(), body)
    sizes = map(float, re.findall(r'font-size="([\d.]+)"', body))
    least = math.ceil(LEAST_TEXT * width / min(sizes, default=math.inf))
    size = f"width:{width:.0f}px;min-width:{least}px;max-width:100%;height:auto"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(alt)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" fill="currentColor" style="{size}">'
        f"{body}</svg>"
    )
