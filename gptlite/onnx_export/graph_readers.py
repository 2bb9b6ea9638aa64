"""How a computation graph is read: what ONNX and torch.fx write down, brought into one form."""

import operator
import re
from ast import literal_eval
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import torch

from gptlite.onnx_export.graph_operators import kind_of

if TYPE_CHECKING:
    import onnx

# the names that shape inference and the older exporter give to unknown sizes
_MADE_UP = r"|unk__\d+|.+_dim_\d+"
Path = tuple[str, ...]  # of modules, as ("h.0", "attn")


@dataclass(frozen=True)
class Node:
    """One operator: what it is, the path of modules it came from, and its values by name."""

    name: str
    op: str
    kind: str  # one of OPERATORS, or "other"
    module: Path
    inputs: tuple[str, ...]  # constants among them
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """Operators in the order in which they run; shapes of values, as "2×T×384", if known."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: dict[str, str]
    constants: frozenset[str]  # values that no input can change: weights, buffers, numbers


def read_onnx(model: "onnx.ModelProto") -> Graph:
    """The graph of an ONNX model.

    An If's branches and a Loop's body are operators of their own, before it.
    """
    import onnx
    from google.protobuf.message import EncodeError

    infos = (*model.graph.value_info, *model.graph.output)
    known = {info.name for info in infos if _onnx_shape(info)}
    if any(value not in known for node in model.graph.node for value in node.output):
        # a shape is only a label: a model too large or too odd to infer any is read without
        with suppress(onnx.shape_inference.InferenceError, ValueError, EncodeError):
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    nodes: list[tuple[Node, Path | None]] = []
    shapes: dict[str, str] = {}
    constants: set[str] = set()

    def walk(
        graph: "onnx.GraphProto", outer: Mapping[str, str], prefix: str, path: Path
    ) -> list[str]:
        """Collect what is in a graph, and give its outputs.

        Inside a branch names have a prefix, as two branches may use one.
        """
        own = [value.name for value in (*graph.initializer, *graph.input)]
        own += [value for node in graph.node for value in node.output]
        names = {**outer, **{name: prefix + name for name in own}}

        def named(values: Iterable[str]) -> list[str]:
            # "" stands for an optional one left out
            return [names.get(value, value) for value in values if value]

        constants.update(named(tensor.name for tensor in graph.initializer))
        shapes.update({names[tensor.name]: _shape(tensor.dims) for tensor in graph.initializer})
        for info in (*graph.value_info, *graph.input, *graph.output):
            if shape := _onnx_shape(info):
                shapes.setdefault(names.get(info.name, info.name), shape)
        for node in graph.node:
            inputs, outputs = named(node.input), named(node.output)
            copied = node.op_type == "Identity" and constants.issuperset(inputs)
            if node.op_type == "Constant" or copied:
                constants.update(outputs)
                continue
            module = _onnx_module(node)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    within = (*(module or path), f"{node.op_type}: {attribute.name}")
                    deeper = f"{prefix}{node.name or node.op_type}.{attribute.name}."
                    inputs += walk(attribute.g, names, deeper, within)
            kind, ends = kind_of(node.op_type, node.domain), (tuple(inputs), tuple(outputs))
            nodes.append((Node(node.name, node.op_type, kind, (), *ends), path or module))
        return named(value.name for value in graph.output)

    outputs = walk(model.graph, {}, "", ())
    inputs = tuple(value.name for value in model.graph.input if value.name not in constants)
    return Graph(_with_modules(nodes), inputs, tuple(outputs), shapes, frozenset(constants))


def read_fx(
    graph: torch.fx.Graph, module: torch.nn.Module | None, lifted: Mapping[str, str]
) -> Graph:
    """The graph of FX nodes that `module` runs.

    `lifted` names the weights among its placeholders.
    """
    nodes: list[tuple[Node, Path | None]] = []
    shapes, names, constants = {}, {}, set()
    inputs: list[str] = []
    outputs: list[str] = []
    for node in graph.nodes:
        name = node.target if node.op == "get_attr" else lifted.get(node.name, node.name)
        names[node.name] = name
        value = node.meta.get("val", node.meta.get("tensor_meta"))
        if node.op == "get_attr" and value is None:
            value = operator.attrgetter(node.target)(module)
        if hasattr(value, "shape"):
            shapes[name] = _shape(value.shape)
        elif isinstance(value, int | float | torch.SymInt | torch.SymFloat):
            shapes[name] = "scalar"
        reads = [names[n.name] for n in node.all_input_nodes]
        if node.op == "get_attr" or node.name in lifted:
            constants.add(name)
        elif node.op == "placeholder":
            inputs.append(name)
        elif node.op == "output":
            outputs += reads
        elif not (_picks(node) or node.target == "_guards_fn"):
            # of aten.layer_norm.default, layer_norm
            op = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
            if node.op == "call_module":
                layer = operator.attrgetter(node.target)(module)
                named = layer.named_parameters(node.target)
                weights = {key: _shape(weight.shape) for key, weight in named}
                op, reads = type(layer).__name__, [*reads, *weights]
                constants.update(weights)
                shapes |= weights
            picked = [n.name for n in node.users if _picks(n)]
            path = _path([scope for scope, _ in node.meta.get("nn_module_stack", {}).values()])
            ends = tuple(reads), tuple(picked or [name])
            nodes.append((Node(name, op, kind_of(op), (), *ends), path))
    placed = _with_modules(nodes)
    return Graph(placed, tuple(inputs), tuple(outputs), shapes, frozenset(constants))


def _picks(node: torch.fx.Node) -> bool:
    """Whether a node only names one of several outputs of another."""
    if node.target is not operator.getitem or not isinstance(node.args[0], torch.fx.Node):
        return False
    return isinstance(node.args[0].meta.get("val"), tuple | list)


def _onnx_module(node: "onnx.NodeProto") -> Path | None:
    """Where a node came from; None if nowhere.

    One exporter notes it beside the node, the older one in its name.
    """
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            return _path(literal_eval(entry.value)[:-1])  # the last is the operator's own
    name = re.sub(r"(/\w*Fusion/?)+$", "", node.name)  # what ONNX Runtime adds to it
    return tuple(name.split("/")[1:-1]) if name.startswith("/") else None


def _path(scopes: list[str]) -> Path | None:
    """Nested names, each in full, as a path of what each adds: h.0, h.0.attn -> (h.0, attn)."""
    if any(scope.startswith("_empty_nn_module_stack") for scope in scopes):
        return None  # torch.export's own, as for the size of an input
    scopes = list(dict.fromkeys(["", *scopes]))
    return tuple(inner.removeprefix(f"{outer}.") for outer, inner in pairwise(scopes))


def _with_modules(nodes: list[tuple[Node, Path | None]]) -> tuple[Node, ...]:
    """The nodes in their modules; one from nowhere, as a quantizer's, is where it is read."""
    readers: dict[str, list[Path]] = {}
    placed = []
    for node, module in reversed(nodes):
        if module is None:
            paths = [path for value in node.outputs for path in readers.get(value, [])]
            levels = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
            module = tuple(names[0] for names in levels)
        for value in node.inputs:
            readers.setdefault(value, []).append(module)
        placed.append(replace(node, module=module))
    return tuple(reversed(placed))


def _onnx_shape(info: "onnx.ValueInfoProto") -> str | None:
    """The shape of a value; None if it, or all of its sizes, are unknown."""
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    sizes = [
        size.dim_value if size.HasField("dim_value") else size.dim_param
        for size in tensor.shape.dim
    ]
    sizes = ["?" if re.fullmatch(_MADE_UP, str(size)) else size for size in sizes]
    return None if sizes and set(sizes) == {"?"} else _shape(sizes)


def _shape(sizes: Iterable[Any]) -> str:
    return "×".join(str(size).replace(" ", "") for size in sizes) or "scalar"
