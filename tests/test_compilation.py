"""The swapped parts compute what those they replace compute; a step is compiled once."""

import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gptlite.checkpoints import read_tensors, write_tensors
from gptlite.compilation import linears as compilation
from gptlite.compilation.linears import (
    GemvLinear,
    ReductionLinear,
    load_kernels,
    pack_weights,
    reduction_attention,
    single_query_attention,
)
from gptlite.generate import decode_one_token, prefill
from gptlite.kv_cache import KVCache, StaticKVCache
from gptlite.model import naive_attention, sdpa_attention

KINDS = [ReductionLinear, GemvLinear]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prompt(B, T, seed=0):
    return torch.randint(17, (B, T), generator=torch.Generator().manual_seed(seed))


@given(
    st.sampled_from(KINDS), st.integers(1, 200), st.integers(1, 70), st.booleans(),
    st.sampled_from([(), (1,), (1, 1), (3, 1), (2, 2), (5,), (2, 3, 2), (0,), (2, 0)]),
    st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
@torch.no_grad()
def test_a_swapped_linear_is_the_linear_to_rounding(kind, K, N, has_bias, rows, dtype):
    """Against float64: within the rounding of the result and of a float32 sum of K terms."""
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=has_bias).to(dtype)
    x = random(*rows, K, dtype=dtype)
    exact = F.linear(
        x.double(), linear.weight.double(), linear.bias.double() if has_bias else None
    )
    sizes = F.linear(x.double().abs(), linear.weight.double().abs()) + 1
    y = kind(linear)(x)
    assert y.shape == exact.shape and y.dtype == dtype
    eps, rounds_products = (
        torch.finfo(dtype).eps,
        kind is ReductionLinear and dtype == torch.bfloat16,
    )  # in eager mode
    bound = (
        eps * exact.abs() * (1 + (dtype == torch.float32))
        + 2e-7 * K * sizes
        + rounds_products * 2 * eps * sizes
    )
    assert bool(((y.double() - exact).abs() <= bound).all())


@torch.no_grad()
def test_few_rows_are_dot_products_and_many_are_one_product():
    linear = nn.Linear(64, 48)
    x = random(GemvLinear.few + 1, 64)
    swapped = GemvLinear(linear)
    assert torch.equal(swapped(x), linear(x))
    row_by_row = torch.cat([swapped(row) for row in x[: GemvLinear.few].split(1)])
    assert torch.equal(swapped(x[: GemvLinear.few]), row_by_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_weights_are_the_same_weights_in_one_piece(make_model, tmp_path, dtype):
    model = make_model(n_embd=20, n_head=2).to(dtype)  # 20 numbers fill no line of the cache
    before, idx = copy.deepcopy(model), prompt(2, 7)
    packed = pack_weights(model)
    assert packed is model and packed.lm_head.weight is packed.wte.weight
    assert torch.equal(packed(idx), before(idx))
    starts = [p.data_ptr() for p in packed.parameters()]
    assert len({p.untyped_storage().data_ptr() for p in packed.parameters()}) == 1
    assert starts == sorted(starts) and all((start - starts[0]) % 64 == 0 for start in starts)
    kept = {name: t for name, t in packed.state_dict().items() if name != "lm_head.weight"}
    write_tensors(
        tmp_path / "packed.safetensors", kept, {}
    )  # which refuses tensors that overlap
    assert all(
        torch.equal(t, kept[name])
        for name, t in read_tensors(tmp_path / "packed.safetensors")[0].items()
    )
    for p, q in zip(packed.parameters(), before.parameters(), strict=True):
        p.add_(1)  # none of them overlaps another
        assert torch.equal(p, q + 1)


@torch.no_grad()
def test_two_threads_give_the_same_bits():
    linear, x = nn.Linear(100, 300), random(2, 100)
    one = GemvLinear(linear)(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(GemvLinear(linear)(x), one)
    finally:
        torch.set_num_threads(1)


def test_a_gradient_through_the_kernel_is_refused():
    linear = nn.Linear(8, 4)
    with pytest.raises(
        RuntimeError,
        match=r"GemvLinear has no backward pass; call it under torch\.no_grad\(\)\.",
    ):
        GemvLinear(linear)(random(1, 8))
    linear.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no backward pass"):  # for the bias alone
        GemvLinear(linear)(random(1, 8))
    linear.weight.requires_grad_()
    GemvLinear(linear)(
        random(5, 8)
    ).sum().backward()  # many rows go through F.linear, which has one
    assert linear.weight.grad is not None


def test_gemv_reads_strided_tensors_rightly():
    load_kernels()
    x, weight, bias = random(2, 100)[:, ::2], random(50, 30).T, random(60)[::2]
    torch.testing.assert_close(
        torch.ops.gptlite.gemv(x, weight, bias), F.linear(x, weight, bias), **CLOSE
    )


def test_float16_takes_the_kernel_that_pytorch_has():
    linear = nn.Linear(64, 48).half()
    x = random(1, 64, dtype=torch.float16)
    assert torch.equal(GemvLinear(linear)(x), linear(x))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        ((1, 3), (2, 4), None, ValueError, "the rows are [1, 3], but must end in 4 columns."),
        ((1, 4), (2, 4), (3,), ValueError, "the bias has 3 numbers, but must have 2."),
        ((1, 4), (4,), None, ValueError, "the weight is [4], but must be (N, K)."),
        ((1, 0), (2, 0), None, ValueError, "the weight is [2, 0], but must be (N, K)."),
        ((), (2, 4), None, ValueError, "the rows are [], but must end in 4 columns."),
    ],
)
def test_gemv_refuses_shapes_that_do_not_fit(x, weight, bias, error, message):
    load_kernels()
    with pytest.raises(error, match=re.escape(message)):
        torch.ops.gptlite.gemv(
            torch.ones(x), torch.ones(weight), None if bias is None else torch.ones(bias)
        )


def test_gemv_refuses_two_formats():
    load_kernels()
    with pytest.raises(
        TypeError, match="the rows are BFloat16, but the weight is Float; all must be alike"
    ):
        torch.ops.gptlite.gemv(torch.ones(1, 4).bfloat16(), torch.ones(2, 4), None)
    with pytest.raises(TypeError, match="all must be alike"):
        torch.ops.gptlite.gemv(torch.ones(1, 4), torch.ones(2, 4), torch.ones(2).bfloat16())


@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 9),
    st.integers(1, 24),
    st.data(),
)
def test_attention_as_reductions_is_attention(B, H_kv, Tq, Tk, data):
    Tq = min(Tq, Tk)
    q, k, v = (
        random(B, 4, Tq, 8),
        random(B, H_kv, Tk, 8, seed=1),
        random(B, H_kv, Tk, 8, seed=2),
    )
    torch.testing.assert_close(reduction_attention(q, k, v), naive_attention(q, k, v), **CLOSE)
    seen = torch.zeros(Tq, Tk, dtype=torch.bool)
    for row in seen:  # each query sees something
        row[data.draw(st.lists(st.integers(0, Tk - 1), min_size=1))] = True
    torch.testing.assert_close(
        reduction_attention(q, k, v, seen), naive_attention(q, k, v, seen), **CLOSE
    )


@given(
    st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 40), st.integers(1, 150),
    st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.data(),
)  # fmt: skip
@torch.no_grad()
def test_attention_of_one_query_is_attention(B, H_kv, Tk, D, dtype, masked, data):
    """Against attention in float64: within the rounding of the result and of float32 sums."""
    dtype = getattr(torch, dtype)
    q, k, v = random(B, 4, 1, D), random(B, H_kv, Tk, D, seed=1), random(B, H_kv, Tk, D, seed=2)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    seen = None
    if masked:
        seen = torch.zeros(1, Tk, dtype=torch.bool)
        seen[0, data.draw(st.lists(st.integers(0, Tk - 1), min_size=1))] = True
    y = single_query_attention(q, k, v, seen)
    exact = naive_attention(q.double(), k.double(), v.double(), seen)
    assert y.shape == q.shape and y.dtype == dtype
    eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    assert bool(((y.double() - exact).abs() <= eps * exact.abs() + 1e-5).all())


@torch.no_grad()
def test_attention_of_one_query_reads_nothing_that_is_hidden():
    q, k, v = random(1, 2, 1, 8), random(1, 2, 6, 8, seed=1), random(1, 2, 6, 8, seed=2)
    seen = torch.tensor([[True, False, True, True, False, False]])
    k[:, :, 1], v[:, :, 4:] = torch.nan, torch.inf
    wanted = naive_attention(q, k[:, :, seen[0]], v[:, :, seen[0]])
    torch.testing.assert_close(single_query_attention(q, k, v, seen), wanted, **CLOSE)


@torch.no_grad()
def test_attention_of_one_query_takes_views_as_the_model_and_a_cache_make_them():
    qkv, cache = (
        random(2, 1, 3 * 4 * 8).view(2, 1, 12, 8).transpose(1, 2),
        random(2, 2, 4, 20, 8, seed=1),
    )
    q, (keys, values) = qkv[:, :4], cache.unbind(0)
    views = [
        (keys[:, :, :7], values[:, :, :7]),
        (keys[:, ::2], values[:, ::2]),
        (keys.mT.contiguous().mT, values),
    ]
    for k, v in views:
        torch.testing.assert_close(
            single_query_attention(q, k, v), naive_attention(q, k, v), **CLOSE
        )


@torch.no_grad()
def test_more_queries_and_float16_take_the_attention_that_pytorch_has():
    q, k, v = random(1, 2, 3, 8), random(1, 2, 5, 8, seed=1), random(1, 2, 5, 8, seed=2)
    assert torch.equal(single_query_attention(q, k, v), sdpa_attention(q, k, v))
    q, k, v = q[:, :, :1].half(), k.half(), v.half()
    assert torch.equal(single_query_attention(q, k, v), sdpa_attention(q, k, v))


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "message"),
    [
        (
            (4, 1, 8),
            (1, 4, 5, 8),
            (1, 4, 5, 8),
            None,
            "are [4, 1, 8], but must be (B, H, 1, D).",
        ),
        ((1, 4, 1, 8), (1, 4, 5, 8), (1, 4, 6, 8), None, "must both be (1, H_kv, T, 8) for"),
        ((1, 4, 1, 8), (2, 4, 5, 8), (2, 4, 5, 8), None, "must both be (1, H_kv, T, 8) for"),
        (
            (1, 4, 1, 8),
            (1, 3, 5, 8),
            (1, 3, 5, 8),
            None,
            "the 3 heads of keys do not divide the 4",
        ),
        (
            (1, 4, 1, 8),
            (1, 0, 5, 8),
            (1, 0, 5, 8),
            None,
            "the 0 heads of keys do not divide the 4",
        ),
        ((1, 4, 1, 8), (1, 4, 5, 8), (1, 4, 5, 8), (1, 4), "the mask must be 5 booleans."),
    ],
)
def test_attention_of_one_query_refuses_shapes_that_do_not_fit(q, k, v, mask, message):
    load_kernels()
    q, k, v = (torch.ones(shape) for shape in (q, k, v))
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.gptlite.single_query_attention(
            q, k, v, None if mask is None else torch.ones(mask) > 0
        )


def test_attention_of_one_query_refuses_two_formats_and_gradients():
    q, k, v = random(1, 2, 1, 8), random(1, 2, 5, 8, seed=1), random(1, 2, 5, 8, seed=2)
    with pytest.raises(
        TypeError, match="queries are Float, keys BFloat16, values Float; all must be alike"
    ):
        single_query_attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="the mask must be 5 booleans"):
        single_query_attention(q, k, v, torch.ones(1, 5))
    with pytest.raises(RuntimeError, match="single_query_attention has no backward pass"):
        single_query_attention(q.requires_grad_(), k, v)


@torch.no_grad()
def test_many_rows_are_multiplied_in_float32_where_bfloat16_is_emulated(monkeypatch):
    linear, x = nn.Linear(64, 48).bfloat16(), random(8, 64, dtype=torch.bfloat16)
    product, formats = F.linear, []

    def linear_and_note(x, weight, bias):
        formats.append({x.dtype, weight.dtype, bias.dtype})
        return product(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear_and_note)
    for fast in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(compilation, "fast_dtype", lambda device, fast=fast: fast)
        y = GemvLinear(linear)(x)
        exact = product(x.double(), linear.weight.double(), linear.bias.double())
        torch.testing.assert_close(y.double(), exact, atol=1e-2, rtol=1e-2)
        assert y.dtype == torch.bfloat16
    assert formats == [{torch.bfloat16}, {torch.float32}]


def read_on(step, model, cache, tokens=10):
    """Greedy tokens and logits of a text continued with `step`."""
    logits, found, chosen = prefill(model, prompt(1, 5), cache), [], []
    for _ in range(tokens):
        chosen.append(logits.argmax(-1, keepdim=True))
        logits = step(model, chosen[-1], cache)
        found.append(logits)
    return torch.cat(chosen), torch.stack(found)


class Graphs:
    """A backend for `torch.compile` that keeps the graphs it is given, to run as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


def compiled(backend, **options):
    """`decode_one_token`, compiled afresh: what is compiled is kept with a function's code.

    A break in the graph is allowed, so that it shows as one graph more.
    """
    torch._dynamo.reset()
    return torch.compile(decode_one_token, backend=backend, **options)


@torch.no_grad()
def test_a_step_with_static_shapes_is_compiled_once(make_model):
    model, graphs = make_model(), Graphs()
    cache, step = StaticKVCache(model.config), compiled(graphs, dynamic=False)
    tokens, logits = read_on(step, model, cache, 15)
    assert len(graphs.graphs) == 1
    assert cache.length == 20
    cache.rewind()
    read_on(step, model, cache, 3)
    read_on(step, model, StaticKVCache(model.config), 3)  # nor for another text
    assert len(graphs.graphs) == 1
    expected = read_on(decode_one_token, model, KVCache(model.config), 15)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], **CLOSE)


@torch.no_grad()
def test_a_compiled_step_calls_the_kernel_for_each_linear(make_model):
    model, graphs = make_model(n_layer=3).swap_linears(GemvLinear), Graphs()
    read_on(compiled(graphs, dynamic=False), model, StaticKVCache(model.config), 2)
    called = [node.target for node in graphs.graphs[0].graph.nodes]
    assert sum("gptlite.gemv" in str(target) for target in called) == 3 * 4 + 1
    assert F.linear not in called


@torch.no_grad()
def test_a_compiled_step_on_a_full_cache_fails_and_does_not_count_the_token(make_model):
    model = make_model()
    cache, step = StaticKVCache(model.config), compiled(Graphs(), dynamic=False)
    read_on(step, model, cache, 19)
    assert cache.length == 24
    with pytest.raises((IndexError, RuntimeError)):
        step(model, prompt(1, 1), cache)
    assert cache.length == 24


@torch.no_grad()
def test_a_step_with_a_growing_cache_is_compiled_for_each_token(make_model):
    """The bug that the static cache ends; for shapes that may change, it is compiled twice."""
    model = make_model()
    for options, times in (({"dynamic": False}, 6), ({}, 2)):
        graphs = Graphs()
        read_on(compiled(graphs, **options), model, KVCache(model.config), 6)
        assert len(graphs.graphs) == times


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "attention", "options"),
    [
        (ReductionLinear, reduction_attention, {}),
        (GemvLinear, single_query_attention, {"size_asserts": False}),
        (GemvLinear, single_query_attention, {"cpp_wrapper": True}),
    ],
)
@torch.no_grad()
def test_compiled_greedy_text_is_that_of_the_eager_model(make_model, kind, attention, options):
    model = make_model(n_kv_head=2)
    expected = read_on(decode_one_token, model, KVCache(model.config), 15)
    swapped = copy.deepcopy(model).swap_linears(kind).set_attention(attention)
    step = compiled("inductor", dynamic=False, options=options)
    tokens, logits = read_on(step, swapped, StaticKVCache(model.config), 15)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], atol=1e-4, rtol=1e-4)
