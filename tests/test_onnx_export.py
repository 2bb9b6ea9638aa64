import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_graphs import FORMS

from gptlite.generate import generate
from gptlite.kv_cache import KVCache
from gptlite.model import GPT, naive_attention
from gptlite.onnx_export.cache import (
    AppendingGPT,
    CachedGPT,
    empty_past,
    masked_attention,
    two_part_attention,
)
from gptlite.onnx_export.exporters import (
    TwoHeadBlock,
    export,
    export_cached,
    export_torchscript,
)

pytestmark = pytest.mark.slow  # a first export takes ten seconds, which is importing
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from gptlite.onnx_export.files import check_onnx  # noqa: E402
from gptlite.onnx_export.runtime import OnnxCache, OnnxGPT  # noqa: E402
from gptlite.onnx_export.sessions import open_session  # noqa: E402

BLOCK = (["x"], ["y"], {"x": {0: "B", 1: "T"}})
EACH_FORM = pytest.mark.parametrize(("form", "by_layer"), FORMS.values(), ids=FORMS)


def count(model, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)


def opset(model) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain == "")


@pytest.fixture(scope="module")
def block() -> TwoHeadBlock:
    torch.manual_seed(0)
    return TwoHeadBlock(n_embd=16, block_size=12, dropout=0.5).eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny() -> GPT:
    return tiny_graphs.model()


@pytest.fixture(scope="module")
def sessions():
    """The tiny GPT's graphs in ONNX Runtime, by what they return."""
    names = {form: name for name, form in FORMS.items()} | {"logits": "logits"}
    graphs = {key: tiny_graphs.exported(name) for key, name in names.items()}
    for graph in graphs.values():
        check_onnx(graph)
        assert opset(graph) == 23
    return {key: open_session(graph, threads=1) for key, graph in graphs.items()}


@pytest.fixture(scope="module")
def exported(block, x):
    """A function that exports the block, the same way only once."""
    return cache(lambda **options: export(block, [x], *BLOCK, **options))


def run_block(model, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(open_session(model, threads=1).run(None, {"x": x.numpy()})[0])


def test_the_block_is_attention_with_a_residual(block, x):
    h = block.ln(x)
    parts = [
        torch.stack([linear(h) for linear in linears], dim=1)
        for linears in (block.query, block.key, block.value)
    ]
    expected = x + block.proj(naive_attention(*parts).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), expected)


def test_every_way_of_capturing_computes_the_same(block, x, exported):
    graphs = {
        "plain": export_torchscript(block, [x], *BLOCK),
        "trace": export_torchscript(torch.jit.trace(block, x), [x], *BLOCK),
        "script": export_torchscript(torch.jit.script(block), [x], *BLOCK),
        "dynamo": exported(),
        "raw": exported(optimize=False),
        "compiled": export(torch.compile(block), [x], *BLOCK),
    }
    longer = torch.randn(3, 11, 16)
    for name, graph in graphs.items():
        check_onnx(graph, name)
        torch.testing.assert_close(
            run_block(graph, x), block(x).detach(), atol=1e-5, rtol=0, msg=name
        )
        torch.testing.assert_close(
            run_block(graph, longer), block(longer).detach(), atol=1e-5, rtol=0, msg=name
        )
    assert (
        len(graphs["raw"].graph.node)
        > len(graphs["dynamo"].graph.node)
        == len(graphs["compiled"].graph.node)
    )


def test_only_training_keeps_dropout_and_the_mode_is_put_back(block, x):
    part = block.proj.train()  # one part in another mode than the rest
    trained, plain = export(block, [x], *BLOCK, training=True), export(block, [x], *BLOCK)
    assert (count(trained, "Dropout"), count(plain, "Dropout")) == (3, 0)
    assert part.training and not block.training and not block.dropout.training
    part.eval()


def test_a_training_graph_drops_anew_at_each_run(exported, x):
    session = open_session(exported(training=True), threads=1, optimize=False)
    first, second = (session.run(None, {"x": x.numpy()})[0] for _ in range(2))
    assert not np.array_equal(first, second)
    session = open_session(exported(), threads=1)
    first, second = (session.run(None, {"x": x.numpy()})[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_the_older_exporter_follows_a_module_s_mode_only_when_told(block, x):
    training = torch.onnx.TrainingMode.TRAINING
    block.train()
    try:
        counts = [
            count(
                export_torchscript(block, [x], *BLOCK), "Dropout"
            ),  # what the post did: the graph of `eval`
            count(export_torchscript(block, [x], *BLOCK, training=training), "Dropout"),
            count(
                export_torchscript(torch.jit.trace(block, x, check_trace=False), [x], *BLOCK),
                "Dropout",
            ),
        ]
    finally:
        block.eval()
    assert counts == [0, 3, 3]


@pytest.mark.parametrize("B", [0, 1])
def test_a_dynamic_size_that_would_become_a_constant_is_refused(block, B):
    with pytest.raises(
        ValueError, match=rf"^x is given with B = {B}, which .* give 2 or more\.$"
    ):
        export(block, [torch.zeros(B, 6, 16)], *BLOCK)


def test_an_opset_that_is_too_old_is_refused(block, x):
    with pytest.raises(ValueError, match=r"^opset is 17, but .* 18 or newer\.$"):
        export(block, [x], *BLOCK, opset=17)


@pytest.mark.parametrize("number", [18, 20, 23])
def test_the_opset_is_the_one_asked_for(block, x, exported, number):
    graph = exported(opset=number)
    check_onnx(graph)
    assert opset(graph) == number
    torch.testing.assert_close(run_block(graph, x), block(x).detach(), atol=1e-5, rtol=0)


def test_without_its_packages_an_export_says_what_to_install(block, x, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export(block, [x], *BLOCK)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export_torchscript(block, [x], *BLOCK)


@given(
    B=st.integers(1, 3),
    H_kv=st.sampled_from([1, 2, 4]),
    P=st.integers(0, 6),
    T=st.integers(1, 5),
)
def test_attention_in_two_parts_is_attention(B, H_kv, P, T):
    g = torch.Generator().manual_seed(P + 10 * T)
    q, k, v = (
        torch.randn(B, H, n, 8, generator=g) for H, n in ((4, T), (H_kv, P + T), (H_kv, P + T))
    )
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    (past_k, new_k), (past_v, new_v) = (t.split([P, T], dim=2) for t in (k, v))
    y = two_part_attention(q, (past_k, new_k), (past_v, new_v), mask)
    torch.testing.assert_close(y, naive_attention(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        masked_attention(q, k, v), naive_attention(q, k, v), atol=1e-5, rtol=1e-5
    )


@EACH_FORM
@given(T=st.integers(1, 6), P=st.integers(0, 6))
def test_a_step_is_the_model_s_own(tiny, form, by_layer, T, P):
    idx = torch.randint(17, (2, P + T), generator=torch.Generator().manual_seed(T + 10 * P))
    module, past = form(tiny, by_layer), empty_past(tiny.config, 2, by_layer=by_layer)
    with torch.no_grad():
        if P:
            past = module(idx[:, :P], *past)[1:]
        logits, *after = module(idx[:, P:], *past)
        torch.testing.assert_close(logits[:, -1], tiny(idx)[:, -1], atol=1e-4, rtol=1e-4)
    shape = (2, 2, T if form is AppendingGPT else P + T, 8)
    assert [tensor.shape for tensor in after] == ([shape] * 4 if by_layer else [(4, *shape)])


def test_exporting_leaves_the_model_as_it_was(tiny, sessions):
    assert all(block.attn.attention is GPT(tiny.config).h[0].attn.attention for block in tiny.h)


@given(B=st.integers(1, 4), T=st.integers(1, 24))
def test_the_graph_takes_any_batch_and_length(tiny, sessions, B, T):
    idx = torch.randint(17, (B, T), generator=torch.Generator().manual_seed(B + 10 * T))
    logits = OnnxGPT(sessions["logits"], tiny.config)(idx)
    with torch.no_grad():
        torch.testing.assert_close(logits, tiny(idx), atol=1e-4, rtol=1e-4)


@EACH_FORM
@given(B=st.integers(1, 3), P=st.integers(0, 12), T=st.integers(1, 12))
def test_the_cached_graph_takes_any_batch_past_and_length(
    tiny, sessions, form, by_layer, B, P, T
):
    idx = torch.randint(
        17, (B, P + T), generator=torch.Generator().manual_seed(B + 10 * T + 1000 * P)
    )
    model, cache = (
        OnnxGPT(sessions[form, by_layer], tiny.config),
        OnnxCache(tiny.config, B=B, by_layer=by_layer),
    )
    if P:
        model(idx[:, :P], cache)
    logits = model(idx[:, P:], cache)
    shape = (B, 2, P + T, 8)
    assert [array.shape for array in cache.feed().values()] == (
        [shape] * 4 if by_layer else [(4, *shape)]
    )
    with torch.no_grad():
        torch.testing.assert_close(logits[:, -1], tiny(idx)[:, -1], atol=1e-4, rtol=1e-4)


@EACH_FORM
def test_greedy_text_is_pytorch_s_token_by_token_also_past_the_window(
    tiny, sessions, form, by_layer
):
    idx = torch.randint(17, (2, 5), generator=torch.Generator().manual_seed(1))
    expected = generate(tiny, idx, 30, KVCache(tiny.config, B=2), temperature=0)
    model, cache = (
        OnnxGPT(sessions[form, by_layer], tiny.config),
        OnnxCache(tiny.config, B=2, by_layer=by_layer),
    )
    assert torch.equal(generate(model, idx, 30, cache, temperature=0), expected)


def test_the_names_say_what_goes_in_and_out(sessions):
    inputs, outputs = (
        [end.name for end in ends]
        for ends in (
            sessions[AppendingGPT, True].get_inputs(),
            sessions[AppendingGPT, True].get_outputs(),
        )
    )
    assert inputs == ["idx", "past.k0", "past.v0", "past.k1", "past.v1"]
    assert outputs == ["logits", "new.k0", "new.v0", "new.k1", "new.v1"]
    assert [end.name for end in sessions[CachedGPT, False].get_outputs()] == [
        "logits",
        "present",
    ]


@EACH_FORM
def test_the_trained_teacher_writes_the_same_text(form, by_layer):
    from gptlite.checkpoints import load_pretrained

    teacher = load_pretrained("teacher")
    model, config = teacher.model, teacher.model.config
    exported = OnnxGPT(open_session(export_cached(model, form, by_layer)), config)
    idx = teacher.tokenizer.encode("MIRANDA:\nO wonder")[None]
    expected = generate(model, idx, 120, KVCache(config), temperature=0)
    assert torch.equal(
        generate(exported, idx, 120, OnnxCache(config, by_layer=by_layer), temperature=0),
        expected,
    )
    with torch.no_grad():
        cache = OnnxCache(config, by_layer=by_layer)
        logits = exported(expected[:, :-1], cache)
        assert (logits[:, -1] - model(expected[:, :-1])[:, -1]).abs().max() < 1e-4


def test_no_folder_of_this_machine_is_in_the_file(exported):
    folder = str(Path(__file__).parent.parent).encode()
    assert folder not in exported().SerializeToString()


def test_the_scale_is_of_one_head(tiny):
    assert tiny.config.head_dim == 8  # and not n_embd, as in the post's companion code
    q, k, v = (
        torch.ones(1, 1, 1, 8),
        torch.zeros(1, 1, 2, 8),
        torch.tensor([[[[0.0] * 8, [1.0] * 8]]]),
    )
    k[0, 0, 1] = 1.0
    weight = 1 / (1 + math.exp(-8 / math.sqrt(8)))
    y = two_part_attention(
        q,
        (k[:, :, :1], k[:, :, 1:]),
        (v[:, :, :1], v[:, :, 1:]),
        torch.ones(1, 1, dtype=torch.bool),
    )
    torch.testing.assert_close(y, torch.full((1, 1, 1, 8), weight))
