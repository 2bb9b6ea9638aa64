"""Graphs are read, counted and compared as they are, whoever made them, or refused."""

import logging
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT, Block, GPTConfig, naive_attention
from gptlite.onnx_export.graphs import (
    Graph,
    Node,
    compare_graphs,
    count,
    diff_markdown,
    inside,
    read,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=17, dropout=0.1)
BLOCK_OPERATORS = {
    "LayerNormalization": 2,
    "Softmax": 1,
    "Gelu": 1,
    "Trilu": 1,
    "Where": 1,
    "MatMul": 6,
    "Add": 6,
}


def value(name: str, *sizes: int | str):
    return helper.make_tensor_value_info(name, FLOAT, sizes)


def weight(name: str, *sizes: int):
    return helper.make_tensor(name, FLOAT, sizes, [0.5] * torch.Size(sizes).numel())


def model(nodes, inputs=None, outputs=None, weights=()):
    """A model of ONNX nodes that reads x (T, 3) and gives y (T, 4), if not told otherwise."""
    graph = helper.make_graph(
        nodes, "tiny", inputs or [value("x", "T", 3)], outputs or [value("y", "T", 4)], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def perceptron(*, dropout: bool = False):
    """x W + b through a Relu, its bias a Constant node behind an Identity."""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["xW"], name="/c_fc/MatMul"),
        helper.make_node("Constant", [], ["b0"], value=weight("", 4)),
        helper.make_node("Identity", ["b0"], ["b"]),
        helper.make_node("Add", ["xW", "b"], ["h"], name="/c_fc/Add"),
        helper.make_node("Dropout", ["h"], ["d"], name="/dropout/Dropout"),
        helper.make_node("Relu", ["d" if dropout else "h"], ["y"], name="/Relu"),
    ]
    return model(
        [node for node in nodes if dropout or node.op_type != "Dropout"],
        weights=[weight("W", 3, 4)],
    )


def branching():
    """Two branches that use one name, h, for what each makes."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["x"], ["h"]), helper.make_node("Neg", ["h"], ["out"])],
            name,
            [],
            [value("out")],
        )
        for name, op in (("then", "Exp"), ("else", "Abs"))
    }
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    return model(
        [helper.make_node("If", ["c"], ["y"], name="If", **branches)],
        [value("x", "T", 3), condition],
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, object]:
    """One block in evaluation mode, by each exporter: two files and three graphs of FX."""
    folder, x = tmp_path_factory.mktemp("graphs"), torch.randn(2, 8, 32)
    block = Block(CONFIG, naive_attention).eval()
    paths, T = (
        {"dynamo": folder / "dynamo.onnx", "older": folder / "older.onnx"},
        {1: torch.export.Dim("T")},
    )
    logging.disable(logging.WARNING)  # torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            block, (x,), dynamo=True, dynamic_shapes=(T,), verbose=False
        )
        program.save(paths["dynamo"])
        torch.onnx.export(block, (x,), paths["older"], dynamo=False, input_names=["x"])
        exported = torch.export.export(block, (x,))
        gpt = torch.export.export(GPT(CONFIG).eval(), (torch.zeros(2, 8, dtype=torch.long),))
    logging.disable(logging.NOTSET)
    traced = torch.fx.symbolic_trace(block.mlp)
    return {**paths, "program": program, "exported": exported, "gpt": gpt, "traced": traced}


class Shapes(nn.Module):
    """A module whose graph holds an operator with several outputs, and one of them unused."""

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = x.split(2, dim=-1)
        return F.dropout(first + last, 0.5, training=True)


# ---- reading


def test_operators_are_counted_and_constants_are_not():
    assert count(perceptron()) == {"MatMul": 1, "Add": 1, "Relu": 1}
    graph = read(perceptron(dropout=True))
    assert count(graph) == {"MatMul": 1, "Add": 1, "Dropout": 1, "Relu": 1}
    assert graph.constants == {"W", "b0", "b"}
    assert (graph.inputs, graph.outputs) == (("x",), ("y",))
    assert graph.nodes[1] == Node(
        "/c_fc/Add", "Add", "elementwise", ("c_fc",), ("xW", "b"), ("h",)
    )


def test_shapes_are_inferred_and_written_with_their_letters():
    shapes = read(perceptron()).shapes
    assert {name: shapes[name] for name in ("x", "W", "b", "xW", "h", "y")} == {
        "x": "T×3", "W": "3×4", "b": "4", "xW": "T×4", "h": "T×4", "y": "T×4"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [(("unk__3", 4), "?×4"), (("/h.0/Add_dim_0", "T"), "?×T"), (("unk__1", "unk__2"), None)],
)
def test_sizes_that_nobody_named_are_question_marks(sizes, shape):
    nodes = [helper.make_node("Unknown", ["x"], ["y"], domain="nowhere")]
    assert read(model(nodes, outputs=[value("y", *sizes)])).shapes.get("y") == shape


def test_an_initializer_that_is_also_listed_as_an_input_is_a_constant():
    inputs = [value("x", "T", 3), value("W", 3, 4)]
    graph = read(
        model(
            [helper.make_node("MatMul", ["x", "W"], ["y"])], inputs, weights=[weight("W", 3, 4)]
        )
    )
    assert (graph.inputs, graph.constants) == (("x",), {"W"})


def test_both_branches_of_an_if_are_read_each_with_values_of_its_own():
    graph = read(branching())
    assert count(graph) == {"Exp": 1, "Abs": 1, "Neg": 2, "If": 1}
    assert [node.kind for node in graph.nodes if node.op == "If"] == ["control"]
    by_op = {node.op: node for node in graph.nodes}
    assert by_op["Exp"].outputs != by_op["Abs"].outputs
    assert {node.module for node in graph.nodes} == {
        (),
        ("If: then_branch",),
        ("If: else_branch",),
    }
    negated = {made for node in graph.nodes if node.op == "Neg" for made in node.outputs}
    assert negated < set(by_op["If"].inputs)


def test_the_operators_of_a_block_are_the_same_in_both_exports(exports):
    for name in ("dynamo", "older"):
        counted = count(exports[name])
        assert {op: counted[op] for op in BLOCK_OPERATORS} == BLOCK_OPERATORS, name
        assert not counted["Constant"] and not counted["Identity"], name


@pytest.mark.parametrize("name", ["dynamo", "older", "exported"])
def test_operators_know_the_modules_they_came_from(exports, name):
    graph = read(exports[name])
    assert {node.module for node in graph.nodes} >= {
        (), ("ln_1",), ("ln_2",), ("attn",), ("attn", "c_attn"), ("attn", "c_proj"),
        ("mlp", "c_fc"), ("mlp", "c_proj"),
    }  # fmt: skip
    assert {node.module for node in graph.nodes if node.op.lower() == "softmax"} == {("attn",)}
    assert {node.module for node in graph.nodes if node.op.lower().startswith("split")} == {
        ("attn",)
    }
    assert not [node for node in graph.nodes if node.kind == "other"]


def test_a_program_and_its_file_and_its_models_are_one_graph(exports):
    program = exports["program"]
    assert (
        read(program)
        == read(exports["dynamo"])
        == read(program.model)
        == read(program.model_proto)
    )
    assert read(str(exports["dynamo"])) == read(exports["dynamo"])
    assert read(exports["dynamo"]).shapes["softmax"] == "2×2×T×T"


def test_an_exported_program_has_its_weights_as_constants(exports):
    graph = read(exports["exported"])
    assert (graph.inputs, graph.outputs) == (("x",), ("add_1",))
    assert graph.constants == set(dict(Block(CONFIG, naive_attention).named_parameters()))
    assert count(graph)["linear"] == 4 and count(graph)["layer_norm"] == 2
    assert graph.shapes["attn.c_attn.weight"] == "96×32"
    assert graph.shapes["softmax"] == "2×2×8×8"
    assert count(exports["exported"].module()) == count(graph)


def test_a_symbolic_trace_has_modules_as_operators(exports):
    traced = exports["traced"]
    assert [(node.op, node.module) for node in read(traced).nodes] == [
        ("Linear", ("c_fc",)), ("gelu", ()), ("Linear", ("c_proj",))
    ]  # fmt: skip
    assert read(traced).shapes["c_fc.weight"] == "128×32"
    assert read(traced.graph) == read(traced)


def test_taking_one_of_several_outputs_is_no_operator():
    graph = read(torch.export.export(Shapes(), (torch.randn(2, 6),)))
    assert count(graph) == {"split": 1, "add": 1, "dropout": 1}
    split, add, dropout = graph.nodes
    assert set(add.inputs) < set(split.outputs) and dropout.kind == "random"
    indexed = torch.fx.symbolic_trace(lambda x: x[0])
    assert count(indexed) == {"getitem": 1}  # of a tensor, it is work


def test_inside_a_module_only_its_operators_are_left(exports):
    attention = inside(exports["gpt"], "h.1", "attn")
    assert {node.module[:2] for node in attention.nodes} == {("h.1", "attn")}
    assert (
        count(attention)["linear"] == 2
        and count(attention)["scaled_dot_product_attention"] == 1
    )
    assert (attention.inputs, attention.outputs) == (("layer_norm_2",), ("linear_5",))
    with pytest.raises(
        ValueError,
        match=r"no operator came from h\.2; the modules are dropout, h\.0, h\.1, lm_head, ",
    ):
        inside(exports["gpt"], "h.2")


def test_a_model_too_large_for_shapes_to_be_inferred_is_read_without(monkeypatch):
    from google.protobuf.message import EncodeError

    def infer_shapes(*args, **kwargs):
        raise EncodeError("Failed to serialize proto")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", infer_shapes)
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    ends = [helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [3]) for end in "xy"]
    graph = read(helper.make_model(helper.make_graph(nodes, "two", ends[:1], ends[1:])))
    assert [node.op for node in graph.nodes] == ["Relu", "Relu"]
    assert graph.shapes == {"x": "3", "y": "3"}


@pytest.mark.parametrize(
    ("op", "domain", "kind"),
    [
        ("Gemm", "", "matmul"), ("Softmax", "", "normalise"), ("Gelu", "", "elementwise"),
        ("Concat", "", "shape"),
        ("DequantizeLinear", "", "cast"), ("Dropout", "", "random"), ("Loop", "", "control"),
        ("Attention", "", "fused"), ("FusedMatMul", "com.microsoft", "fused"),
        ("NewThing", "com.microsoft", "fused"),
        ("QuantizeLinear", "com.microsoft", "cast"), ("NonMaxSuppression", "", "other"),
    ],
)  # fmt: skip
def test_each_operator_has_the_kind_of_what_it_does(op, domain, kind):
    nodes = [helper.make_node(op, ["x"], ["y"], domain=domain)]
    assert read(model(nodes)).nodes[0].kind == kind


# ---- what cannot be read


def test_a_file_cut_short_anywhere_is_no_model(tmp_path):
    whole, path = perceptron().SerializeToString(), tmp_path / "cut.onnx"
    path.write_bytes(whole)
    assert count(path)["MatMul"] == 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError,
            match=r"cut\.onnx is no ONNX model, or was cut short; export it again\.$",
        ):
            read(path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 an archive", b"{}", b"\x00" * 64, bytes(range(256))]
)
def test_another_kind_of_file_is_no_model(tmp_path, content):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="is no ONNX model"):
        read(tmp_path / "a.onnx")


def test_a_missing_file_and_an_unsupported_source_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no ONNX file at .*none\.onnx"):
        read(tmp_path / "none.onnx")
    with pytest.raises(TypeError, match=r"^Linear is no graph that can be read"):
        read(nn.Linear(1, 1))


def test_without_onnx_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match="reading an ONNX model needs onnx: pip install onnx"):
        read("a.onnx")


# ---- comparing


def test_comparing_names_what_one_graph_alone_has():
    assert compare_graphs(perceptron(), perceptron(dropout=True)) == [("+", "dropout: Dropout")]
    assert compare_graphs(perceptron(dropout=True), perceptron()) == [("-", "dropout: Dropout")]
    assert (
        diff_markdown(perceptron(), perceptron(dropout=True))
        == "```diff\n+ dropout: Dropout\n```"
    )


def test_a_graph_does_not_differ_from_itself_listed_in_another_order(exports):
    graph = read(exports["dynamo"])
    shape = next(node for node in graph.nodes if node.op == "Trilu")
    moved = [node for node in graph.nodes if node != shape]
    moved.insert(moved.index(next(node for node in moved if node.op == "Not")), shape)
    assert (
        compare_graphs(
            graph, Graph(tuple(moved), graph.inputs, graph.outputs, {}, graph.constants)
        )
        == []
    )
    assert diff_markdown(graph, graph) == "The two graphs have the same operators."


def test_a_graph_that_knows_no_modules_is_compared_by_operators_alone():
    nameless = perceptron(dropout=True)
    for node in nameless.graph.node:
        node.name = ""
    assert compare_graphs(perceptron(), nameless) == [("+", "Dropout")]


def test_what_a_quantizer_adds_is_put_where_it_is_read(exports):
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = exports["dynamo"].with_name("int8.onnx")
    quantization.quantize_dynamic(exports["dynamo"], path)
    changes = compare_graphs(exports["dynamo"], path)
    assert (
        changes.count(("-", "mlp/c_fc: MatMul")) == 1
        and changes.count(("+", "mlp/c_fc: MatMulInteger")) == 1
    )
    assert [line for mark, line in changes if mark == "-"] == [
        f"{module}: MatMul"
        for module in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    ]
