"""Drawings of graphs say all that a graph holds, stand in any page, and are seen everywhere."""

import base64
import io
import logging
import re
import warnings
from collections import Counter
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from PIL import Image
from test_onnx_export_graphs import CONFIG, perceptron

from gptlite.model import Block, naive_attention
from gptlite.onnx_export import graph_drawing
from gptlite.onnx_export.graph_drawing import KINDS, draw_graph
from gptlite.onnx_export.graph_operators import OPERATORS
from gptlite.onnx_export.graphs import Graph, Node, count, read
from gptlite.pictures import DRAWING

pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exports() -> dict[str, object]:
    """One block in evaluation mode as two graphs of FX and one of ONNX."""
    block, x = Block(CONFIG, naive_attention).eval(), torch.randn(2, 8, 32)
    exported = torch.export.export(block, (x,))
    logging.disable(logging.WARNING)  # torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(exported, dynamo=True, verbose=False)
    logging.disable(logging.NOTSET)
    return {"onnx": program, "exported": exported, "traced": torch.fx.symbolic_trace(block.mlp)}


def svg(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.DOTALL)[0])


def texts(figure: str) -> list[str]:
    return [element.text for element in svg(figure).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", ["onnx", "exported", "traced"])
def test_a_drawing_is_well_formed_and_names_every_operator_once(exports, name):
    graph = read(exports[name])
    found = texts(draw_graph(graph, "A block."))
    for op, times in count(graph).items():
        assert found.count(op) >= times, op
    assert set(found) >= {*graph.inputs, *graph.outputs}


def test_frames_are_named_after_modules_and_a_lone_operator_carries_its_own(exports):
    found = texts(draw_graph(exports["onnx"], "A block."))
    assert [found.count(name) for name in ("attn", "mlp", "c_attn", "c_fc", "c_proj")] == [
        1,
        1,
        1,
        1,
        2,
    ]
    assert found.count("ln_1") == found.count("ln_2") == 1


def test_a_module_called_twice_has_no_frame_around_both_calls(exports):
    found = texts(draw_graph(exports["exported"], "A block."))
    assert found.count("dropout") == 4  # in each of two boxes: the operator and the module


def test_weights_are_noted_in_the_box_that_reads_them_and_single_numbers_are_not(exports):
    found = texts(draw_graph(perceptron(), "A layer."))
    assert found.count("W 3×4") == 1 and found.count("W 4") == 1
    boxes = texts(draw_graph(exports["onnx"], "A block."))
    noted = Counter(text for text in boxes if text.startswith("W "))
    products, biases = (
        ["W 32×96", "W 32×32", "W 32×128", "W 128×32"],
        ["W 96", "W 32", "W 128", "W 32"],
    )
    assert noted == Counter(
        [*products, *biases, "W 32, 32", "W 32, 32", "W 8×8"]
    )  # two LayerNorms, and the mask


def test_the_pointer_over_a_box_or_an_edge_shows_its_name():
    titles = [
        title.text
        for title in svg(draw_graph(perceptron(), "A layer.")).iter(
            "{http://www.w3.org/2000/svg}title"
        )
    ]
    assert sorted(titles) == sorted(
        ["x", "/c_fc/MatMul", "/c_fc/Add", "/Relu", "y"] + ["x", "xW", "h", "y"]
    )


def test_edges_carry_shapes(exports):
    found = texts(draw_graph(exports["onnx"], "A block."))
    assert found.count("2×2×8×8") == 4  # scores, scaled, masked, and their softmax
    assert found.count("2×8×96") == 2


def test_the_same_graph_gives_the_same_bytes_and_no_ids_or_styles_that_could_clash(exports):
    first, again, other = (
        draw_graph(exports[name], "A block.") for name in ("onnx", "onnx", "exported")
    )
    assert first == again != other
    for figure in (first, other):
        assert not re.search(r'\sid="|<style|url\(|href|#000000"|"black"|<!--|<\?xml', figure)


def test_a_drawing_is_described_and_never_shrinks_its_text_below_nine_pixels(exports):
    figure = draw_graph(exports["onnx"], 'Shows "a < b".', title="A & B")
    assert figure.startswith('<figure class="gptlite-figure"') and figure.endswith("</figure>")
    assert "<figcaption>A &amp; B" in figure
    root = svg(figure)
    assert (root.get("role"), root.get("aria-label")) == ("img", 'Shows "a < b".')
    width = float(root.get("viewBox").split()[2])
    least = float(re.search(r"min-width:(\d+)px", root.get("style"))[1])
    sizes = {
        float(text.get("font-size")) for text in root.iter("{http://www.w3.org/2000/svg}text")
    }
    assert min(sizes) * least / width >= 9
    for alt in ("", " "):
        with pytest.raises(
            ValueError, match="alt is empty, but must say in a sentence what the drawing shows"
        ):
            draw_graph(exports["onnx"], alt)


def test_every_kind_is_drawn_and_explained():
    assert set(KINDS) == {*OPERATORS, "other"}
    nodes = [
        Node(kind, kind, kind, (), (f"v{i}",), (f"v{i + 1}",)) for i, kind in enumerate(KINDS)
    ]
    figure = draw_graph(
        Graph(tuple(nodes), ("v0",), (f"v{len(nodes)}",), {}, frozenset()), "All kinds."
    )
    for kind, (color, meaning) in KINDS.items():
        assert kind in texts(figure) and meaning in figure
        assert color is None or f'stroke="{color.lower()}"' in figure.lower()
    coloured = {color for color, _ in KINDS.values()}
    assert {kind for kind, (color, _) in KINDS.items() if color is None} == {"shape", "other"}
    assert len(coloured) == 7


def test_names_that_mean_something_to_graphviz_or_html_are_drawn_as_they_are():
    odd = 'a"<b>&\\n'
    node = Node(odd, "Ex<p>&", "other", ('m"<i>\\', "n"), (odd,), ("v",))
    next_one = Node("", "Abs", "elementwise", ('m"<i>\\',), ("v",), ("w",))
    figure = draw_graph(
        Graph((node, next_one), (odd,), ("w",), {"v": 'T"×<3>'}, frozenset()), "Odd names."
    )
    titles = [title.text for title in svg(figure).iter("{http://www.w3.org/2000/svg}title")]
    assert titles.count(odd) == 3  # of the input, the operator and the edge between
    assert set(texts(figure)) == {odd, "Ex<p>&", 'm"<i>\\', "n", 'T"×<3>', "Abs", "w"}


def test_a_graph_whose_output_is_its_input_can_be_drawn():
    assert texts(draw_graph(Graph((), ("x",), ("x",), {}, frozenset()), "Nothing.")) == [
        "x",
        "x",
    ]


def picture(drawing):
    """The PNG that a notebook stores of a drawing, and what it says of it."""
    data, metadata = DisplayFormatter().format(drawing)
    assert list(data) == [DRAWING, "image/png", "text/plain"]
    assert data[DRAWING] == drawing and type(data[DRAWING]) is str
    png = base64.b64decode(data["image/png"], validate=True)
    return Image.open(io.BytesIO(png)).convert("RGB"), metadata["image/png"]


def test_a_notebook_stores_a_picture_on_white_with_title_and_legend_below():
    drawing = draw_graph(perceptron(), "A layer.")
    (image, said), bare = picture(drawing), svg(drawing).get("viewBox").split()[2:]
    assert said["alt"] == "A layer."
    assert image.size == pytest.approx((2 * said["width"], 2 * said["height"]), abs=2)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert said["height"] > float(bare[1]) + 3 * 14  # three kinds of operators
    blue = tuple(int(KINDS["matmul"][0][i : i + 2], 16) for i in (1, 3, 5))
    below = image.crop((0, round(2 * float(bare[1])), *image.size)).getcolors(1 << 24)
    assert any(max(abs(a - b) for a, b in zip(c, blue, strict=True)) < 40 for _, c in below)
    titled, _ = picture(draw_graph(perceptron(), "A layer.", title="<A> & " + "B " * 60))
    assert titled.height > image.height + 3 * 2 * 14


def test_a_picture_is_the_same_bytes_each_time_and_small(exports):
    first, again = (
        draw_graph(exports["onnx"], "A block.")._repr_mimebundle_()[0]["image/png"]
        for _ in range(2)
    )
    assert first == again
    assert len(first) < 150_000


def test_without_graphviz_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(graph_drawing.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(ImportError, match=r"needs Graphviz: pip install graphviz-pure"):
        draw_graph(perceptron(), "A layer.")


def test_what_graphviz_complains_of_is_passed_on(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout=b"", stderr=b"syntax error")
    monkeypatch.setattr(graph_drawing.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match=r"drew nothing: syntax error\.$"):
        draw_graph(perceptron(), "A layer.")


def test_a_notebook_stores_a_drawing_once(exports):
    """IPython's own text of a value is made beside the picture: not the HTML again."""
    from IPython.core.formatters import DisplayFormatter

    drawing = draw_graph(exports["onnx"], "A block.")
    data, _ = DisplayFormatter().format(drawing)
    assert data["text/plain"] == "Figure: A block."
    assert sum("<svg" in str(value) for value in data.values()) == 1
