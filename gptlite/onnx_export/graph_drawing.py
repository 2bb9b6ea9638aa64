"""Drawings of computation graphs, as Graphviz (https://graphviz.org) lays them out."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gptlite.colors import COLORS
from gptlite.onnx_export.graphs import Graph, read

# the colour of an operator's box, None being that of the page's text, and what the legend says of it
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
_FONT_SCALE = 0.86  # the layout is made for Helvetica; a page's own font may be wider, so that it is drawn smaller


def draw_graph(source: Any, alt: str, title: str | None = None) -> str:
    """A drawing of the graph as a figure for any page of HTML: inline SVG, the same bytes for the same graph.

    `alt` says in a sentence what the drawing shows; under it stand `title` and what the colours mean. Its smallest text
    is never under 9 pixels: where the page is too narrow, the figure scrolls. Needs Graphviz or graphviz-pure.
    """
    if not alt.strip():
        raise ValueError("alt is empty, but must say in a sentence what the drawing shows.")
    graph = read(source)
    svg = _inline_svg(_render(graph, "svg", "-Gbgcolor=transparent").decode(), alt)
    kinds = {node.kind for node in graph.nodes}
    legend = [
        f'<span style="white-space:nowrap"><span aria-hidden="true" style="color:{color or "inherit"}">'
        f"{'■' if color else '□'}</span> {meaning}</span>"
        for kind, (color, meaning) in KINDS.items()
        if kind in kinds
    ]
    caption = " ".join(([f"{html.escape(title)}<br>"] if title else []) + legend)
    return (
        f'<figure class="gptlite-figure" style="margin:1em 0;overflow-x:auto">{svg}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def png(source: Any, path: str | Path) -> None:
    """The drawing, on white, at two pixels a point, as a PNG file that appears whole or not at all."""
    part = Path(f"{path}.part")
    part.write_bytes(_render(read(source), "png", "-Gdpi=144"))
    os.replace(part, path)


def _dot(graph: Graph) -> str:
    """The graph in Graphviz's language; the ids there are the names of operators and values."""
    lines = [
        "digraph {pad=0.1 ranksep=0.22 nodesep=0.2 fontname=Helvetica fontsize=13 labeljust=l",
        'node [shape=box style="rounded,filled" fontname=Helvetica fontsize=14 height=0.3 width=0.6 margin="0.1,0.05"'
        ' penwidth=1.2] edge [fontname=Helvetica fontsize=12 arrowsize=0.6 penwidth=0.9 color="#000000a0"]',
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
            shape = (
                graph.shapes.get(value, "") if value not in graph.inputs else ""
            )  # an input's own oval has it
            label = f"  {shape} " if shape else ""
            lines.append(
                f"{makers[value]} -> {reader} [id={_quoted(value)} label={_quoted(label)}]"
            )
    return "\n".join([*lines, "}"])


def _frames(graph: Graph, members: list[int], depth: int) -> list[str]:
    """Boxes of the operators whose modules are the same up to `depth`, in a frame for each module inside."""
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
    """Members that hang together through values of their own: a module that is called twice has two frames."""
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
    """An operator: its name, the modules that no frame shows, and the shapes of the weights it reads."""
    node = graph.nodes[i]
    shapes = [graph.shapes.get(value, "") for value in node.inputs if value in graph.constants]
    # of more than one number; and what a shape operator reads as a list says where to, it is no weight
    shapes = [shape for shape in shapes if not {*shape.split("×")} <= {"1", "scalar", ""}]
    weights = ", ".join(shape for shape in shapes if "×" in shape or node.kind != "shape")
    label = filter(None, [node.op, "/".join(node.module[depth:]), weights and f"W {weights}"])
    color = KINDS[node.kind][0]
    edge, tint = (color, f"{color}22") if color else ("#00000090", "#0000000c")
    attributes = f'id={_quoted(node.name or node.op)} color="{edge}" fillcolor="{tint}"'
    return f"n{i} [label={_quoted(*label)} {attributes}]"


def _oval(name: str, value: str, shape: str = "") -> str:
    label = _quoted(*filter(None, [value, shape]))
    return f'{name} [id={_quoted(value)} label={label} shape=ellipse style="" color="#000000a0" margin="0.05,0.02"]'


def _quoted(*lines: str) -> str:
    return json.dumps("\n".join(lines), ensure_ascii=False)


def _render(graph: Graph, form: str, *options: str) -> bytes:
    """What Graphviz makes of the graph: the system's, or the PyPI package's that stands in for it."""
    beside = shutil.which("graphviz-pure", path=Path(sys.executable).parent)
    program = shutil.which("dot") or beside or shutil.which("graphviz-pure")
    if program is None:
        raise ImportError(
            "drawing a graph needs Graphviz: pip install graphviz-pure, or install Graphviz itself."
        )
    run = subprocess.run(
        [program, f"-T{form}", *options], input=_dot(graph).encode(), capture_output=True
    )
    if run.returncode or not run.stdout:
        raise OSError(
            f"{program} drew nothing: {run.stderr.decode(errors='replace').strip() or 'no reason given'}."
        )
    return run.stdout


def _inline_svg(svg: str, alt: str) -> str:
    """Graphviz's SVG document as one element for a page: in its text colour and font, without ids, described."""
    width, height = (
        float(size) for size in re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg).groups()
    )
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
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(alt)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" fill="currentColor" '
        f'style="width:{width:.0f}px;min-width:{0.9 * width:.0f}px;max-width:100%;height:auto">{body}</svg>'
    )
