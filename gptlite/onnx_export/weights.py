"""The weights of an exported graph: in fewer bits, or left out of a file to be looked at."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptlite.onnx_export.files import write_onnx
from gptlite.onnx_export.quiet import quiet

if TYPE_CHECKING:
    import onnx

LARGE = 64  # numbers; smaller constants are shapes, scales and masks, and are left as they are


def quantize_dynamic(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """int8 weights with a scale for each matrix; activations are quantized at each step.

    ONNX Runtime's quantizer makes them. Embeddings, and products of two activations
    (attention's), stay as they are.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def quantize(source: Path, target: Path) -> None:
        only = {"op_types_to_quantize": ["MatMul"], "extra_options": {"MatMulConstBOnly": True}}
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, **only)

    return _through_files(model, quantize)


def quantize_static(
    model: "onnx.ModelProto", samples: Iterable[Mapping[str, np.ndarray]]
) -> "onnx.ModelProto":
    """int8 weights and activations, whose ranges are fixed beforehand from `samples` of inputs.

    Written as QDQ: a QuantizeLinear and a DequantizeLinear stand around what is quantized, and
    the runtime fuses them into operators on integers where it has such.
    """
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.samples = iter(samples)

        def get_next(self):
            return next(self.samples, None)

    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    # 1.23, the last release for Python 3.10, knows opset 23 but not its QuantizeLinear; its own
    # stands in
    own = tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24)

    def quantize(a: Path, b: Path) -> None:
        quantize_static(
            a,
            b,
            Reader(),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=[n.name for n in products if n.input[1] in constants],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"UseQDQContribOps": own},
        )

    return _through_files(model, quantize)


def quantize_int4(model: "onnx.ModelProto", group: int = 32) -> "onnx.ModelProto":
    """4-bit weights, a scale for each `group` of inputs, in ONNX Runtime's MatMulNBits."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        # accuracy level 4: activations in int8, where the processor multiplies integers
        quantizer = MatMulNBitsQuantizer(
            copy, block_size=group, is_symmetric=True, accuracy_level=4
        )
        quantizer.process()
    return quantizer.model.model


def store_half(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same model, its float32 weights stored in float16, each with a Cast behind it.

    The Cast is done once, at loading. Only weights that float16 holds exactly are stored so, as
    all of a checkpoint kept in float16 are.
    """
    import onnx
    from onnx import helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, casts = result.graph, []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < LARGE:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(
                helper.make_node(
                    "Cast", [tensor.name], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT
                )
            )
    nodes = [*casts, *graph.node]  # a graph is written in the order in which it can be computed
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def without_weights(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph alone, to be looked at: large weights keep name, type and shape alone."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if np.prod(tensor.dims) >= LARGE:
            slim = onnx.TensorProto(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
            )
            tensor.CopyFrom(slim)
    return result


def weight_bytes(model: "onnx.ModelProto") -> int:
    """Bytes of all constants of the graph, as stored."""
    from onnx import numpy_helper

    return sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def _through_files(
    model: "onnx.ModelProto", convert: Callable[[Path, Path], None]
) -> "onnx.ModelProto":
    """What `convert(source, target)` makes of a model: ONNX Runtime's quantizers want files."""
    import onnx

    # a value that is zero in all samples has a range of zero, which the quantizer divides by,
    # and sets right afterwards
    with tempfile.TemporaryDirectory() as folder, quiet(), np.errstate(all="ignore"):
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        write_onnx(model, source)
        convert(source, target)
        return onnx.load(target)
