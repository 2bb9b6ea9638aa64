"""How a computation graph is read: what ONNX and torch.fx write down, brought into one form for `gptlite.graphs`."""

import operator
import re
from ast import literal_eval
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnx

# Operators by what they do, as ONNX and as PyTorch name them: in lower case, letters and digits
# only.
OPERATORS = {
    "matmul": "matmul gemm linear addmm mm bmm baddbmm einsum matmulinteger qlinearmatmul",
    "normalise": "layernormalization nativelayernorm layernorm simplifiedlayernormalization rmsnormalization rmsnorm "
    "softmax logsoftmax reducemean reducesum reducemax reducemin mean sum var amax amin any all cumsum argmax topk",
    "elementwise": "add sub rsub mul div truediv floordiv mod pow sqrt rsqrt reciprocal neg abs exp log tanh sigmoid "
    "sin cos erf gelu relu silu where not and or logicalnot logicaland logicalor bitwisenot bitwiseand bitwiseor equal "
    "less greater lessorequal greaterorequal eq ne lt le gt ge isnan min max minimum maximum clip clamp floor ceil "
    "round sign maskedfill trilu tril triu",
    "shape": "reshape view unsafeview transpose permute t concat cat stack split splitwithsizes chunk slice select "
    "squeeze unsqueeze expand tile repeat repeatinterleave flatten shape size symsize gather gathernd gatherelements "
    "scatternd scatterelements indexselect index indexput embedding getitem copy contiguous clone alias identity "
    "constantofshape scalartensor range arange ones zeros full oneslike zeroslike fulllike onehot pad",
    "cast": "cast castlike to tocopy type float half bfloat16 int long bool quantizelinear dequantizelinear "
    "dynamicquantizelinear quantizepertensor dequantizepertensor quantizeperchannel dequantizeperchannel",
    "random": "dropout nativedropout randomuniform randomuniformlike randomnormal randomnormallike bernoulli "
    "multinomial rand randn randlike randnlike",
    "control": "if loop scan cond whileloop",
    "fused": "attention multiheadattention groupqueryattention rotaryembedding scaleddotproductattention "
    "matmulnbits fastgelu quickgelu biasgelu skiplayernormalization embedlayernormalization dynamicquantizematmul",
}
_KINDS = {name: kind for kind, names in OPERATORS.items() for name in names.split()}
_MADE_UP = r"|unk__\d+|.+_dim_\d+"  # the names that shape inference and the older exporter give to unknown sizes


@dataclass(frozen=True)
class Node:
    """One operator: what it is, the path of modules it came from, as ("h.0", "attn"), and its values by name."""

    name: str
    op: str
    kind: str  # one of OPERATORS, or "other"
    module: tuple[str, ...]
    inputs: tuple[str, ...]  # constants among them
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """Operators in the order in which they run, and the shapes of values, as "2×T×384", where they are known."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: dict[str, str]
    constants: frozenset[str]  # values that no input can change: weights, buffers, numbers


def read_onnx(model: "onnx.ModelProto") -> Graph:
    """The graph of an ONNX model; an If's branches and a Loop's body are operators of their own, before it."""
    import onnx

    known = {
        info.name
        for info in (*model.graph.value_info, *model.graph.output)
        if _onnx_shape(info)
    }
    if any(value not in known for node in model.graph.node for value in node.output):
        # a shape is only a label: a model too large or too odd to infer any is read without
        with suppress(onnx.shape_inference.InferenceError, ValueError):
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    nodes, shapes, constants = [], {}, set()

    def walk(
        graph: "onnx.GraphProto", outer: Mapping[str, str], prefix: str, path: tuple[str, ...]
    ) -> list[str]:
        """Collect what is in a graph, and give its outputs; inside a branch names have a prefix, as two may use one."""
        own = [value.name for value in (*graph.initializer, *graph.input)]
        own += [value for node in graph.node for value in node.output]
        names = {**outer, **{name: prefix + name for name in own}}

        def named(values: Iterable[str]) -> list[str]:
            return [
                names.get(value, value) for value in values if value
            ]  # "" stands for an optional one left out

        constants.update(named(tensor.name for tensor in graph.initializer))
        shapes.update({names[tensor.name]: _shape(tensor.dims) for tensor in graph.initializer})
        for info in (*graph.value_info, *graph.input, *graph.output):
            if shape := _onnx_shape(info):
                shapes.setdefault(names.get(info.name, info.name), shape)
        for node in graph.node:
            inputs, outputs = named(node.input), named(node.output)
            if node.op_type == "Constant" or (
                node.op_type == "Identity" and constants.issuperset(inputs)
            ):
                constants.update(outputs)
                continue
            module = _onnx_module(node)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    within = (*(module or path), f"{node.op_type}: {attribute.name}")
                    inputs += walk(
                        attribute.g,
                        names,
                        f"{prefix}{node.name or node.op_type}.{attribute.name}.",
                        within,
                    )
            kind = _kind(node.op_type, node.domain)
            nodes.append(
                Node(
                    node.name, node.op_type, kind, path or module, tuple(inputs), tuple(outputs)
                )
            )
        return named(value.name for value in graph.output)

    outputs = walk(model.graph, {}, "", ())
    inputs = tuple(value.name for value in model.graph.input if value.name not in constants)
    return Graph(_with_modules(nodes), inputs, tuple(outputs), shapes, frozenset(constants))


def read_fx(
    graph: torch.fx.Graph, module: torch.nn.Module | None, lifted: Mapping[str, str]
) -> Graph:
    """The graph of FX nodes that `module` runs; `lifted` names the weights among its placeholders."""
    nodes, shapes, constants, inputs, outputs, names = [], {}, set(), [], [], {}
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
            op = getattr(node.target, "__name__", str(node.target)).split(".")[
                0
            ]  # of aten.layer_norm.default, layer_norm
            if node.op == "call_module":
                layer = module.get_submodule(node.target)
                weights = {
                    key: _shape(weight.shape)
                    for key, weight in layer.named_parameters(node.target)
                }
                op, reads = type(layer).__name__, [*reads, *weights]
                constants.update(weights)
                shapes |= weights
            picked = [n.name for n in node.users if _picks(n)]
            path = _path([scope for scope, _ in node.meta.get("nn_module_stack", {}).values()])
            nodes.append(Node(name, op, _kind(op), path, tuple(reads), tuple(picked or [name])))
    return Graph(
        _with_modules(nodes), tuple(inputs), tuple(outputs), shapes, frozenset(constants)
    )


def _picks(node: torch.fx.Node) -> bool:
    """Whether a node only names one of several outputs of another."""
    return node.target is operator.getitem and isinstance(
        node.args[0].meta.get("val"), tuple | list
    )


def _kind(op: str, domain: str = "") -> str:
    return _KINDS.get(
        re.sub("[^a-z0-9]", "", op.lower()),
        "fused" if domain not in ("", "ai.onnx") else "other",
    )


def _onnx_module(node: "onnx.NodeProto") -> tuple[str, ...] | None:
    """Where a node came from, which one exporter notes beside it, and the older one in its name; None if nowhere."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            return _path(literal_eval(entry.value)[:-1])  # the last is the operator's own
    name = re.sub(r"(/\w*Fusion/?)+$", "", node.name)  # what ONNX Runtime adds to it
    return tuple(name.split("/")[1:-1]) if name.startswith("/") else None


def _path(scopes: list[str]) -> tuple[str, ...] | None:
    """Nested module names, each in full, as a path of what each adds: h.0, h.0.attn -> ("h.0", "attn")."""
    if any(scope.startswith("_empty_nn_module_stack") for scope in scopes):
        return None  # torch.export's own, as for the size of an input
    scopes = list(dict.fromkeys(["", *scopes]))
    return tuple(
        scope.removeprefix(f"{outer}.")
        for outer, scope in zip(scopes, scopes[1:], strict=False)
    )


def _with_modules(nodes: list[Node]) -> tuple[Node, ...]:
    """The nodes, one that came from nowhere, as a quantizer's, put where all that reads it is."""
    readers: dict[str, list[tuple[str, ...]]] = {}
    placed = []
    for node in reversed(nodes):
        if node.module is None:
            paths = [path for value in node.outputs for path in readers.get(value, [])]
            levels = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
            node = replace(node, module=tuple(names[0] for names in levels))
        for value in node.inputs:
            readers.setdefault(value, []).append(node.module)
        placed.append(node)
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
