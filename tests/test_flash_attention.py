"""Attention in tiles is attention, with its gradients, for every cut; bytes are counted."""

import copy
import math
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite.flash_attention.tiles import (
    Traffic,
    attend,
    backward_traffic,
    flash_attention,
    flash_backward,
    flash_forward,
    forward_traffic,
    merge,
    split_kv_attention,
)
from gptlite.model import naive_attention

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "H_kv": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "Tq": st.integers(1, 9),
        "past": st.integers(0, 7),
        "D": st.sampled_from([1, 4, 8]),
    }
)
BLOCKS = st.integers(1, 12)


def qkv(B=1, H_kv=2, groups=1, Tq=5, past=0, D=4, seed=0, scale=1.0, dtype=torch.float32):
    """Random queries of the last Tq of past + Tq positions, and keys and values of all."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(B, H_kv * groups, Tq, D)] + 2 * [(B, H_kv, past + Tq, D)]
    return [(scale * torch.randn(shape, generator=rng)).to(dtype) for shape in shapes]


@given(SHAPES, BLOCKS, BLOCKS)
def test_any_cut_into_tiles_gives_the_same_answer(shape, block_q, block_k):
    q, k, v = qkv(**shape)
    out, lse = flash_forward(q, k, v, block_q, block_k)
    torch.testing.assert_close(out, naive_attention(q, k, v), **CLOSE)
    scores = q @ k.repeat_interleave(shape["groups"], 1).mT / math.sqrt(shape["D"])
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(shape["past"] + 1)
    torch.testing.assert_close(
        lse, scores.masked_fill(hidden, -math.inf).logsumexp(-1), **CLOSE
    )


@given(SHAPES, BLOCKS, BLOCKS)
def test_gradients_are_those_of_the_naive_twin(shape, block_q, block_k):
    q, k, v = (t.requires_grad_() for t in qkv(**shape))
    naive = naive_attention(q, k, v)
    grad = torch.randn(naive.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(naive, (q, k, v), grad)
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = flash_forward(q, k, v, block_q, block_k)
    found = flash_backward(
        grad, q, k, v, out, lse, block_k, block_q
    )  # not the cut of the forward pass
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@given(SHAPES, BLOCKS, BLOCKS, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_bytes_are_those_of_the_formula(shape, block_q, block_k, dtype):
    q, k, v = qkv(**shape, dtype=dtype)
    sizes = (
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        dtype.itemsize,
        block_q,
        block_k,
    )
    forward, backward = Traffic(), Traffic()
    out, lse = flash_forward(q, k, v, block_q, block_k, forward)
    flash_backward(torch.ones_like(out), q, k, v, out, lse, block_q, block_k, backward)
    assert forward == forward_traffic(*sizes)
    assert backward == backward_traffic(*sizes)


def test_the_formula_for_a_square_of_whole_blocks():
    """n blocks of b queries read 1 + ... + n blocks of b keys: T (T + b) / (2 b)."""
    T, b, D = 256, 32, 64
    found = forward_traffic(1, 1, 1, T, T, D, 4, b, b)
    assert found.read == 4 * D * (T + T * (T + b) // b)
    assert found.written == 4 * T * (D + 1)


@given(st.data(), st.integers(1, 8), st.integers(2, 12))
def test_parts_may_be_merged_in_any_order(data, Tq, Tk):
    scores, v = torch.randn(Tq, Tk), torch.randn(Tk, 3)
    cuts = sorted(data.draw(st.sets(st.integers(1, Tk - 1), max_size=4)))
    parts = [
        attend(s, w)
        for s, w in zip(scores.tensor_split(cuts, 1), v.tensor_split(cuts), strict=True)
    ]
    parts = data.draw(st.permutations(parts))
    torch.testing.assert_close(reduce(merge, parts).output(), scores.softmax(-1) @ v, **CLOSE)
    torch.testing.assert_close(reduce(merge, parts).logsumexp(), scores.logsumexp(-1), **CLOSE)


def test_a_part_without_a_visible_key_changes_nothing():
    scores, v = torch.randn(3, 4), torch.randn(4, 2)
    hidden = attend(torch.full((3, 5), -math.inf), torch.randn(5, 2))
    for merged in (merge(attend(scores, v), hidden), merge(hidden, attend(scores, v))):
        torch.testing.assert_close(merged.output(), scores.softmax(-1) @ v, **CLOSE)


@pytest.mark.parametrize("attention", [flash_attention, split_kv_attention])
def test_large_scores_do_not_overflow(attention):
    q, k, v = qkv(Tq=70, D=8, scale=30.0)
    torch.testing.assert_close(attention(q, k, v), naive_attention(q, k, v), **CLOSE)


@given(SHAPES, st.integers(1, 20))
def test_keys_in_any_number_of_parts(shape, splits):
    q, k, v = qkv(**shape)
    torch.testing.assert_close(
        split_kv_attention(q, k, v, splits=splits), naive_attention(q, k, v), **CLOSE
    )
    mask = torch.rand(q.shape[2], k.shape[2], generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 0] = True
    masked = naive_attention(q, k, v, mask)
    torch.testing.assert_close(split_kv_attention(q, k, v, mask, splits), masked, **CLOSE)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v = qkv(B=2, groups=2, Tq=100, past=30, D=16, dtype=dtype)
    expected = naive_attention(q.float(), k.float(), v.float())
    for attention in (flash_attention, split_kv_attention):
        found = attention(q, k, v)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, atol=HALF[dtype], rtol=HALF[dtype])


def test_what_is_not_contiguous_is_taken(make_model):
    q, k, v = (
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(B=2, groups=3, Tq=9, past=2)
    )
    assert not q.is_contiguous()
    torch.testing.assert_close(flash_attention(q, k, v), naive_attention(q, k, v), **CLOSE)


def test_a_model_trains_with_it(make_model):
    model = make_model(n_kv_head=2)
    twin = copy.deepcopy(model).set_attention(flash_attention)
    idx = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    for m in (model, twin):
        m(idx).square().mean().backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_memory_holds_no_matrix_of_scores():
    """The largest tensor that is made is one of the arguments' size, or a tile's."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(t, torch.Tensor):
                    self.numbers = max(self.numbers, t.numel())
            return result

    q, k, v = qkv(H_kv=1, Tq=512, D=4)
    for run, least, most in (
        (naive_attention, 512 * 512, 512 * 512),
        (flash_attention, 0, 64 * 64),
    ):
        with Largest() as largest:
            run(q, k, v)
        assert least <= largest.numbers <= most


def bad(change):
    """Arguments of which one thing is wrong."""
    q, k, v = qkv(H_kv=2, Tq=5, D=4)
    return change(q, k, v)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            lambda q, k, v: (q[0], k, v),
            ValueError,
            r"have the shapes \(2, 5, 4\), .* but must be \(B, H, Tq, D\)",
        ),
        (lambda q, k, v: (q, k, v[:, :, 1:]), ValueError, "have the shapes"),
        (
            lambda q, k, v: (q[..., 1:], k, v),
            ValueError,
            "q has batch and head size 1, 3, but k 1, 4",
        ),
        (
            lambda q, k, v: (q[:, :1], k, v),
            ValueError,
            "q has 1 heads, which the 2 heads of k do not divide",
        ),
        (
            lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]),
            ValueError,
            "there are 5 queries and 4 keys",
        ),
        (lambda q, k, v: (q[:, :, :0], k, v), ValueError, "there are 0 queries"),
        (
            lambda q, k, v: (q.half(), k, v),
            TypeError,
            "q, k and v are torch.float16, torch.float32",
        ),
        (
            lambda q, k, v: (q.double(), k.double(), v.double()),
            TypeError,
            "but must all be torch.float32",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(change, error, sentence):
    for attention in (flash_attention, split_kv_attention):
        with pytest.raises(error, match=sentence):
            attention(*bad(change))


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="knows the causal mask alone"):
        flash_attention(*qkv(), mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="splits is 0, but must be at least 1"):
        split_kv_attention(*qkv(), splits=0)
