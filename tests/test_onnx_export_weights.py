import logging

import numpy as np
import pytest
import torch

from gptlite.model import GPT, GPTConfig
from gptlite.onnx_export.files import check_onnx
from gptlite.onnx_export.runtime import OnnxCache, OnnxGPT
from gptlite.onnx_export.sessions import open_session

pytestmark = pytest.mark.slow  # a first export takes ten seconds, which is importing
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gptlite.onnx_export.exporters import export_cached  # noqa: E402
from gptlite.onnx_export.weights import (  # noqa: E402
    quantize_dynamic,
    quantize_int4,
    quantize_static,
    store_half,
    weight_bytes,
    without_weights,
)

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=16, vocab_size=11)
LINEARS = (
    4 * CONFIG.n_layer + 1
)  # of a large model the exporter leaves the head, the embedding's transpose, unfolded
WEIGHTS = 12 * CONFIG.n_layer * CONFIG.n_embd**2 + CONFIG.vocab_size * CONFIG.n_embd


@pytest.fixture(scope="module")
def tiny() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).half())
    return model


@pytest.fixture(scope="module")
def graph(tiny):
    return export_cached(tiny)


def count(model, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)


def logits(model) -> np.ndarray:
    step = OnnxGPT(open_session(model, threads=1), CONFIG)
    return step(torch.arange(10)[None] % 11, OnnxCache(CONFIG)).numpy()


def samples():
    for T in (1, 4, 8):
        past = np.zeros((4, 1, 2, 0, 32), np.float32)
        yield {"idx": np.arange(T)[None] % 11, "past": past}


def test_dynamic_quantization_takes_the_linears_alone(graph):
    quantized = quantize_dynamic(graph)
    check_onnx(quantized)
    assert count(quantized, "MatMulInteger") == LINEARS
    assert count(quantized, "MatMul") == count(graph, "MatMul") - LINEARS
    assert weight_bytes(graph) - weight_bytes(quantized) == pytest.approx(3 * WEIGHTS, rel=0.01)
    difference = np.abs(logits(quantized) - logits(graph)).max()
    assert 0 < difference < 0.1 * np.abs(logits(graph)).max()


def test_static_quantization_writes_qdq_around_the_linears_alone(graph):
    quantized = quantize_static(graph, samples())
    check_onnx(quantized)
    assert count(quantized, "MatMul") == count(
        graph, "MatMul"
    )  # integers come with the runtime's fusion
    made = {node.output[0]: node.op_type for node in quantized.graph.node}
    around = [
        node
        for node in quantized.graph.node
        if node.op_type == "MatMul" and made.get(node.input[1]) == "DequantizeLinear"
    ]
    assert len(around) == LINEARS
    assert all(made[node.input[0]] == "DequantizeLinear" for node in around)
    assert (
        0 < np.abs(logits(quantized) - logits(graph)).max() < 0.3 * np.abs(logits(graph)).max()
    )


@pytest.mark.parametrize(
    ("version", "domain"), [("1.23.2", "com.microsoft"), ("1.24.0", ""), ("2.0.0", "")]
)
def test_a_runtime_that_knows_no_newer_quantizelinear_gets_its_own(
    graph, monkeypatch, version, domain
):
    monkeypatch.setattr("onnxruntime.__version__", version)
    quantized = quantize_static(graph, samples())
    assert {
        node.domain for node in quantized.graph.node if node.op_type == "QuantizeLinear"
    } == {domain}


@pytest.mark.parametrize("group", [16, 32])
def test_four_bits_and_a_scale_a_group(graph, group):
    quantized = quantize_int4(graph, group)
    assert count(quantized, "MatMulNBits") == LINEARS
    saved = WEIGHTS * (4 - 0.5 - 4 / group)
    assert weight_bytes(graph) - weight_bytes(quantized) == pytest.approx(saved, rel=0.01)
    assert count(graph, "MatMulNBits") == 0  # the original is left alone
    assert (
        0 < np.abs(logits(quantized) - logits(graph)).max() < 0.3 * np.abs(logits(graph)).max()
    )


def test_quantizing_leaves_the_log_as_it_was(graph, capfd):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    quantize_int4(graph)
    quantize_dynamic(graph)
    assert (root.level, list(root.handlers)) == before
    assert capfd.readouterr() == ("", "")


def test_halves_are_exact_and_half_as_large(graph):
    halved = store_half(graph)
    check_onnx(halved)
    assert weight_bytes(halved) < 0.52 * weight_bytes(graph)
    assert np.array_equal(logits(halved), logits(graph))


def test_a_weight_that_float16_does_not_hold_stays(graph):
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    tensor = max(changed.graph.initializer, key=lambda t: np.prod(t.dims))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] = 1 + 2**-20
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    halved = store_half(changed)
    assert (
        next(t for t in halved.graph.initializer if t.name == tensor.name).data_type
        == onnx.TensorProto.FLOAT
    )
    assert np.array_equal(logits(halved), logits(changed))


def test_a_graph_without_weights_keeps_its_nodes_and_shapes(graph):
    bare = without_weights(graph)
    assert [node.name for node in bare.graph.node] == [node.name for node in graph.graph.node]
    shapes = [
        {t.name: tuple(t.dims) for t in model.graph.initializer} for model in (bare, graph)
    ]
    assert shapes[0] == shapes[1]
    assert bare.ByteSize() < graph.ByteSize() - 0.95 * weight_bytes(graph)
