from dataclasses import asdict

import numpy as np
import pytest
import tiny_graphs
import torch
from tiny_graphs import CONFIG, FORMS

from gptlite.generate import generate
from gptlite.kv_cache import KVCache
from gptlite.model import GPT
from gptlite.onnx_export.runtime import BoundCache, BoundGPT, OnnxCache, OnnxGPT
from gptlite.onnx_export.sessions import open_session, optimized

pytestmark = pytest.mark.slow  # a first export takes ten seconds, which is importing
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gptlite.onnx_export.exporters import export_cached, export_gpt  # noqa: E402


@pytest.fixture(scope="module")
def tiny() -> GPT:
    return tiny_graphs.model()


@pytest.fixture(scope="module")
def graphs():
    return {name: tiny_graphs.exported(name) for name in (*FORMS, "without a cache")}


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
        OnnxCache(CONFIG, by_layer="layer" in form),
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
        tiny, idx, 30, KVCache(CONFIG), temperature=0
    )  # past the window, where it is rewound
    bound = BoundGPT(open_session(graphs["present"], threads=1), CONFIG)
    cache = BoundCache(CONFIG)
    assert torch.equal(generate(bound, idx, 30, cache, temperature=0), expected)
    assert cache.length == CONFIG.block_size
    with pytest.raises(
        ValueError, match=r"^a bound cache can be rewound to 0 alone, not to 3\.$"
    ):
        cache.rewind(3)


@pytest.mark.parametrize(
    ("form", "found"),
    [
        ("new", "takes idx, past and returns logits, new"),
        ("new, by layer", "takes idx, past.k0 and returns logits, new.k0"),
        ("present, by layer", "takes idx, past.k0 and returns logits, present.k0"),
        ("without a cache", "takes idx and returns logits"),
    ],
)
def test_only_a_graph_that_returns_its_whole_cache_can_be_bound(graphs, form, found):
    """Bound to another, the past would be the last token alone, from the third one on."""
    with pytest.raises(ValueError) as error:
        BoundGPT(open_session(graphs[form], threads=1), CONFIG)
    wanted = "idx, past and logits, present: export_cached(model, CachedGPT)"
    assert str(error.value) == f"the graph {found}, but can be bound only with {wanted}."


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_format_is_refused_before_anything_is_said(make_model, dtype, capfd):
    for export in (export_cached, export_gpt):
        with pytest.raises(ValueError) as error:
            export(make_model(**asdict(CONFIG)).to(dtype))
        remedy = "export model.float().cpu(), and store_half halves the file"
        assert str(error.value) == f"wte.weight is {dtype} on cpu; {remedy}."
    with pytest.raises(ValueError, match=r"^wte\.weight is torch\.float32 on meta; "):
        export_gpt(GPT(CONFIG).to("meta"))
    assert capfd.readouterr() == ("", "")


def test_a_bound_text_that_is_too_long_is_refused(graphs):
    model, cache = (
        BoundGPT(open_session(graphs["present"], threads=1), CONFIG),
        BoundCache(CONFIG),
    )
    model(torch.zeros(1, 18, dtype=torch.long), cache)
    with pytest.raises(ValueError, match=r"^25 tokens are more than the model's block_size"):
        model(torch.zeros(1, 7, dtype=torch.long), cache)
    assert cache.length == 18


def test_too_long_a_text_is_refused(graphs):
    model, cache = OnnxGPT(open_session(graphs["new"], threads=1), CONFIG), OnnxCache(CONFIG)
    model(torch.zeros(1, 18, dtype=torch.long), cache)
    with pytest.raises(
        ValueError, match=r"^25 tokens are more than the model's block_size of 24\.$"
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
