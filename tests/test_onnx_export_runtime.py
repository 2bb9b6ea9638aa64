from dataclasses import asdict

import numpy as np
import pytest
import torch

from gptlite.generate import generate
from gptlite.kv_cache import KVCache
from gptlite.model import GPT, GPTConfig
from gptlite.onnx_export.cache import AppendingGPT, CachedGPT
from gptlite.onnx_export.runtime import (
    BoundCache,
    BoundGPT,
    OnnxCache,
    OnnxGPT,
    check_onnx,
    load_onnx,
    open_session,
    optimized,
)

pytestmark = pytest.mark.slow  # a first export takes ten seconds, which is importing
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from gptlite.onnx_export.exporters import export_cached  # noqa: E402

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=11)


@pytest.fixture(scope="module")
def tiny(make_model) -> GPT:
    return make_model(**asdict(CONFIG))


@pytest.fixture(scope="module")
def graphs(tiny):
    graphs = {form.returns: export_cached(tiny, form) for form in (CachedGPT, AppendingGPT)}
    return graphs | {"new, by layer": export_cached(tiny, by_layer=True)}


def doubled(opset: int = 20, values: int = 4) -> "onnx.ModelProto":
    """y = x + w."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [values]) for name in "xy")
    weight = numpy_helper.from_array(np.arange(values, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "sum", [x], [y], [weight]
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )


def test_a_file_is_read_whole_with_its_weights_beside_it(tmp_path):
    onnx.save(
        doubled(values=400),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    session = open_session(tmp_path / "m.onnx", threads=1)
    assert (session.run(None, {"x": np.ones(400, np.float32)})[0] == 1 + np.arange(400)).all()


def test_weights_that_are_gone_are_named(tmp_path):
    onnx.save(
        doubled(values=400),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    (tmp_path / "w.bin").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"^m\.onnx keeps its weights in w\.bin, which must lie beside it",
    ):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, keep):
    content = doubled(values=400).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"^m\.onnx "):
        load_onnx(tmp_path / "m.onnx")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 200)
    with pytest.raises(
        ValueError, match=r"^m\.onnx is no ONNX model, or was cut short; export it again\.$"
    ):
        load_onnx(tmp_path / "m.onnx")


def test_no_file_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no ONNX file at .*m\.onnx; export the model first\.$"
    ):
        open_session(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [6, 99])
def test_an_opset_that_cannot_be_run_is_refused(opset):
    with pytest.raises(
        ValueError, match=rf"^it is written in opset {opset}, but opsets 7 to \d+ can be read"
    ):
        check_onnx(doubled(opset), "it")


def test_a_graph_that_breaks_a_rule_is_refused():
    model = doubled()
    model.graph.node[0].input[1] = "nowhere"
    with pytest.raises(ValueError, match=r"^the model breaks a rule of ONNX \(.*\)\.$"):
        open_session(model)


def test_a_provider_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match=r"^this onnxruntime has no TensorrtExecutionProvider; it has .*CPU"
    ):
        open_session(doubled(), providers=["TensorrtExecutionProvider", "CPUExecutionProvider"])


def test_the_optimiser_fuses_nodes_and_changes_nothing(graphs):
    before, after = graphs["present"], optimized(graphs["present"])
    kinds = [{node.op_type for node in model.graph.node} for model in (before, after)]
    assert "FastGelu" in kinds[1] - kinds[0]
    assert "Gelu" in kinds[0] - kinds[1]
    feed = {"idx": np.ones((1, 3), np.int64), "past": np.zeros((4, 1, 2, 0, 8), np.float32)}
    outputs = [
        open_session(before, threads=1, optimize=optimize).run(None, feed)
        for optimize in (False, True)
    ]
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("form", ["present", "new", "new, by layer"])
def test_the_cache_can_be_rewound(tiny, graphs, form):
    model, cache = (
        OnnxGPT(open_session(graphs[form], threads=1), CONFIG),
        OnnxCache(CONFIG, 1, "layer" in form),
    )
    idx = torch.arange(8)[None]
    model(idx[:, :5], cache)
    first = model(idx[:, 5:6], cache)
    cache.rewind(5)
    assert cache.length == 5
    assert torch.equal(model(idx[:, 5:6], cache), first)
    with pytest.raises(ValueError, match=r"^a cache of 6 tokens cannot be rewound to 7\.$"):
        cache.rewind(7)


def test_a_bound_cache_gives_the_same_text(tiny, graphs):
    idx = torch.tensor([[1, 2, 3]])
    expected = generate(
        tiny, idx, 20, KVCache(CONFIG), temperature=0
    )  # past the window, where it is rewound
    bound = BoundGPT(open_session(graphs["present"], threads=1), CONFIG)
    cache = BoundCache(CONFIG)
    assert torch.equal(generate(bound, idx, 20, cache, temperature=0), expected)
    assert cache.length == CONFIG.block_size
    with pytest.raises(
        ValueError, match=r"^a bound cache can be rewound to 0 alone, not to 3\.$"
    ):
        cache.rewind(3)


def test_too_long_a_text_is_refused(graphs):
    model, cache = OnnxGPT(open_session(graphs["new"], threads=1), CONFIG), OnnxCache(CONFIG)
    model(torch.zeros(1, 10, dtype=torch.long), cache)
    with pytest.raises(
        ValueError, match=r"^17 tokens are more than the model's block_size of 16\.$"
    ):
        model(torch.zeros(1, 7, dtype=torch.long), cache)


def test_a_cache_of_another_form_is_refused(graphs):
    model = OnnxGPT(open_session(graphs["new, by layer"], threads=1), CONFIG)
    with pytest.raises(
        ValueError,
        match=r"^the graph takes idx, past\.k0, but is given idx, past; .* by_layer\.$",
    ):
        model(torch.zeros(1, 3, dtype=torch.long), OnnxCache(CONFIG))
    with pytest.raises(
        ValueError, match=r"^the graph takes idx, past\.k0, but is given idx; .* by_layer\.$"
    ):
        model(torch.zeros(1, 3, dtype=torch.long))


def test_without_onnx_runtime_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        open_session(doubled())


def test_what_the_runtime_cannot_run_is_a_sentence():
    model = doubled()
    model.graph.node[0].op_type, model.graph.node[0].domain = "Nothing", "nobody"
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    with pytest.raises(
        ValueError, match=r"^ONNX Runtime [\d.]+ cannot run the model \(.*Nothing.*\)\.$"
    ):
        open_session(model)
