"""Computation graphs, read, counted and compared: ONNX models and torch.fx graphs alike.

Weights and other constants are not nodes of a graph here: they belong to the operator that
reads them.
"""

import difflib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptlite.onnx_export.files import parse_onnx
from gptlite.onnx_export.graph_readers import Graph, Node, read_fx, read_onnx


def read(source: Any) -> Graph:
    """The graph of an ONNX model or file, or of what torch.export, torch.onnx or torch.fx made.

    Weights in a file beside the model are not read. An If's branches and a Loop's body are read
    as operators of their own, before it. A FileNotFoundError, ValueError (not ONNX, or cut
    short) or TypeError says what is wrong.
    """
    if isinstance(source, Graph):
        return source
    if isinstance(source, torch.fx.Graph):
        return read_fx(source, source.owning_module, {})
    if isinstance(source, torch.fx.GraphModule):
        return read_fx(source.graph, source, {})
    if isinstance(source, torch.export.ExportedProgram):
        names = source.graph_signature
        lifted = {
            **names.inputs_to_parameters,
            **names.inputs_to_buffers,
            **names.inputs_to_lifted_tensor_constants,
        }
        return read_fx(source.graph, source.graph_module, lifted)
    try:
        import onnx
    except ImportError:
        raise ImportError("reading an ONNX model needs onnx: pip install onnx.") from None
    if isinstance(source, str | Path):
        return read_onnx(parse_onnx(Path(source)))
    if type(source).__module__.startswith("onnx_ir"):
        import onnx_ir

        source = onnx_ir.to_proto(source)
    source = getattr(source, "model_proto", source)
    if not isinstance(source, onnx.ModelProto):
        kinds = (
            "an ONNX model, the path of one, or a graph of torch.fx, torch.export or torch.onnx"
        )
        raise TypeError(f"{type(source).__name__} is no graph that can be read; give {kinds}.")
    return read_onnx(source)


def count(source: Any) -> Counter[str]:
    """How many there are of each operator; constants are none."""
    return Counter(node.op for node in read(source).nodes)


def inside(source: Any, *module: str) -> Graph:
    """The part of a graph that came from one module, by its path, as "h.0", "attn"."""
    graph = read(source)
    nodes = tuple(node for node in graph.nodes if node.module[: len(module)] == module)
    if not nodes:
        paths = sorted({"/".join(node.module[: len(module)]) for node in graph.nodes} - {""})
        known = ", ".join(paths) or "none"
        raise ValueError(f"no operator came from {'/'.join(module)}; the modules are {known}.")
    made = dict.fromkeys(value for node in nodes for value in node.outputs)
    read_here = dict.fromkeys(value for node in nodes for value in node.inputs)
    others = [node for node in graph.nodes if node not in nodes]
    read_after = {value for node in others for value in node.inputs} | set(graph.outputs)
    inputs = tuple(v for v in read_here if v not in made and v not in graph.constants)
    outputs = tuple(value for value in made if value in read_after)
    return replace(graph, nodes=nodes, inputs=inputs, outputs=outputs)


def compare_graphs(a: Any, b: Any) -> list[tuple[str, str]]:
    """What one graph has and the other has not, in order.

    An operator is ("-", "h.0/attn: Div") if a alone has it, and "+" if b alone.
    The order is that of the data, whatever the order in which the same operators are listed.
    Where one of them knows no modules, as after ONNX Runtime's optimisation, operators are
    compared without.
    """
    before, after = _by_dataflow(read(a)), _by_dataflow(read(b))
    placed = all(any(node.module for node in nodes) for nodes in (before, after))
    keys_a, keys_b = (
        [(node.module if placed else (), node.op) for node in nodes]
        for nodes in (before, after)
    )
    matcher = difflib.SequenceMatcher(None, keys_a, keys_b, autojunk=False)
    changes = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag != "equal":
            changes += [("-", _line(node)) for node in before[i:j]]
            changes += [("+", _line(node)) for node in after[k:m]]
    return changes


def diff_markdown(a: Any, b: Any) -> str:
    """`compare_graphs` as Markdown that pages colour; a sentence if nothing differs."""
    lines = [f"{mark} {line}" for mark, line in compare_graphs(a, b)]
    if not lines:
        return "The two graphs have the same operators."
    return "\n".join(["```diff", *lines, "```"])


def _line(node: Node) -> str:
    return ": ".join(filter(None, ("/".join(node.module), node.op)))


def _by_dataflow(graph: Graph) -> list[Node]:
    """The nodes, each after those whose values it reads; last those that no output needs."""
    makers = {value: node for node in graph.nodes for value in node.outputs}
    ordered: dict[Node, None] = {}
    opened: set[Node] = set()
    ends = [makers[value] for value in reversed(graph.outputs) if value in makers]
    stack = [*reversed(graph.nodes), *ends]
    while stack:
        node = stack.pop()
        if node in opened:
            # seen a second time: all before it are there; a third time changes nothing
            ordered[node] = None
        else:
            opened.add(node)
            before = [makers[value] for value in reversed(node.inputs) if value in makers]
            stack += [node, *(maker for maker in before if maker not in opened)]
    return list(ordered)
