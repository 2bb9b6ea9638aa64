"""Fewer heads, tokens and bits: what is exact is exact, what is rounded within its bound."""

import copy
import re
from dataclasses import replace
from itertools import cycle, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite.model import GPT, GPT2_SMALL, causal_mask, naive_attention
from gptlite.smaller_caches import (
    QuantizedKVCache,
    RollingKVCache,
    dequantize,
    grouped_attention,
    quantize,
    quantized_kv_cache_bytes,
    share_kv_heads,
)

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def prompt(B, T, seed=0):
    return torch.randint(17, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_chunks(model, idx, cache, sizes):
    """Logits of idx read into the cache in pieces of the given sizes."""
    return torch.cat([model(piece, cache) for piece in idx.split(sizes, dim=1)], dim=1)


SPLITS = st.integers(2, 24).flatmap(
    lambda T: st.sets(st.integers(1, T - 1)).map(
        lambda at: [b - a for a, b in pairwise([0, *sorted(at), T])]
    )
)


# fewer heads


@torch.no_grad()
def equal_within_groups(model: GPT, groups: int) -> GPT:
    """The model with each head of keys and values replaced by the first of its group."""
    twin, D = copy.deepcopy(model), model.config.head_dim
    for block in twin.h:
        for p in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            kv = p[model.config.n_embd :].view(2, groups, -1, D, *p.shape[1:])
            kv[:] = kv[:, :, :1].clone()
    return twin


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_heads_that_are_equal_are_shared_without_loss(make_model, n_kv_head):
    twin = equal_within_groups(make_model(), n_kv_head)
    shared = share_kv_heads(twin, n_kv_head)
    assert shared.config.kv_heads == n_kv_head
    assert not shared.training
    torch.testing.assert_close(shared(prompt(2, 20)), twin(prompt(2, 20)), **CLOSE)


def test_a_shared_head_is_the_mean_of_those_that_it_replaces(make_model):
    model = make_model()
    shared = share_kv_heads(model, 2)
    x = torch.randn(1, 3, 32)
    _, k, v = model.h[1].attn.c_attn(x).split(32, -1)
    _, k2, v2 = shared.h[1].attn.c_attn(x).split([32, 16, 16], -1)
    for mine, theirs in ((k2, k), (v2, v)):
        torch.testing.assert_close(mine.view(3, 2, 8), theirs.view(3, 2, 2, 8).mean(2), **CLOSE)
    # pooling in two steps, 4 -> 2 -> 1, is pooling in one, and the original is as it was
    torch.testing.assert_close(
        share_kv_heads(shared, 1)(prompt(1, 9)), share_kv_heads(model, 1)(prompt(1, 9)), **CLOSE
    )
    torch.testing.assert_close(model.state_dict(), make_model().state_dict())


def test_what_is_pooled_keeps_mode_attention_and_format(make_model):
    model = make_model().set_attention(naive_attention).bfloat16().train()
    shared = share_kv_heads(model, 2)
    assert shared.training and shared.wte.weight.dtype == torch.bfloat16
    assert all(block.attn.attention is naive_attention for block in shared.h)
    assert shared.lm_head.weight is shared.wte.weight


@pytest.mark.parametrize("n_kv_head", [0, 3, 8])
def test_heads_that_cannot_be_shared_out(make_model, n_kv_head):
    with pytest.raises(
        ValueError,
        match=f"n_kv_head is {n_kv_head}, which does not divide the model's 4 KV heads",
    ):
        share_kv_heads(make_model(), n_kv_head)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 5),
    st.booleans(),
)
def test_grouped_attention_is_attention(B, H_kv, group, Tq, past, masked):
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(B, H_kv * group, Tq, 8, generator=rng)
    k, v = torch.randn(2, B, H_kv, past + Tq, 8, generator=rng)
    mask = (
        causal_mask(Tq, past + Tq) & (torch.rand(Tq, past + Tq, generator=rng) < 0.7)
        if masked
        else None
    )
    if masked:
        mask[:, 0] = True
    found = grouped_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask)
    torch.testing.assert_close(found, naive_attention(q, k, v, mask), **CLOSE)


def test_heads_that_no_group_fits_are_refused():
    q, (k, v) = torch.randn(1, 4, 2, 8), torch.randn(2, 1, 3, 2, 8)
    with pytest.raises(ValueError, match="q has 4 heads, which the 3 heads of k do not divide"):
        grouped_attention(q, k, v)


def test_grouped_attention_makes_no_copy_of_the_keys():
    """No tensor that it makes is as large as the keys, which naive attention multiplies."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple) else [result]:
                if isinstance(t, torch.Tensor) and not t._is_view():
                    self.numbers = max(self.numbers, t.numel())
            return result

    q, (k, v) = torch.randn(1, 8, 1, 4), torch.randn(2, 1, 2, 500, 4)
    for attention, least, most in (
        (grouped_attention, 0, 32),
        (naive_attention, 4 * k.numel(), 4 * k.numel()),
    ):
        with Largest() as largest:
            attention(q, k, v)
        assert least <= largest.numbers <= most


# fewer tokens


def windowed(window, sinks):
    """Attention to the first `sinks` and the last `window` tokens of a whole text."""

    def attention(q, k, v, mask=None):
        Tq, Tk = q.shape[2], k.shape[2]
        distance = torch.arange(Tk - Tq, Tk)[:, None] - torch.arange(Tk)
        return naive_attention(
            q, k, v, (distance >= 0) & ((distance < window) | (torch.arange(Tk) < sinks))
        )

    return attention


@given(SPLITS, st.integers(1, 20), st.integers(0, 4), st.sampled_from([1, 4]))
def test_a_rolling_cache_is_attention_under_a_window(
    make_model, sizes, window, sinks, n_kv_head
):
    model, idx = make_model(n_kv_head=n_kv_head), prompt(2, sum(sizes))
    cache = RollingKVCache(model.config, B=2, window=window, sinks=sinks)
    found = in_chunks(model, idx, cache, sizes)
    expected = copy.deepcopy(model).set_attention(windowed(window, sinks))(idx)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert cache.length == idx.shape[1]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 4)
)
def test_past_the_last_position_the_others_come_round(make_model, sizes, window, sinks):
    """As with a position for each token, where the table repeats all but the sinks' rows."""
    model, idx = make_model(), prompt(1, sum(sizes))
    around = cycle(range(sinks, 24))
    rows = [n if n < sinks else next(around) for n in range(idx.shape[1])]
    long = GPT(replace(model.config, block_size=idx.shape[1]), windowed(window, sinks)).eval()
    state = model.state_dict()
    long.load_state_dict(state | {"wpe.weight": state["wpe.weight"][rows]})
    cache = RollingKVCache(model.config, window=window, sinks=sinks)
    torch.testing.assert_close(in_chunks(model, idx, cache, sizes), long(idx), **CLOSE)
    assert cache.nbytes == 2 * 2 * 32 * (window + sinks) * 4  # however long the text


def test_positions_come_round_without_those_of_the_sinks(make_model):
    cache = RollingKVCache(make_model().config, window=8, sinks=3)
    cache.length = 22
    assert cache.positions(5, 24, torch.device("cpu")).tolist() == [22, 23, 3, 4, 5]
    cache.length = 0
    assert cache.positions(5, 24, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]


def test_a_rolling_cache_refuses_what_it_cannot_do(make_model):
    config = make_model().config
    for window, sinks in ((0, 4), (8, -1)):
        with pytest.raises(
            ValueError,
            match=f"window is {window} and sinks is {sinks}, but they must be at least 1 and 0",
        ):
            RollingKVCache(config, window=window, sinks=sinks)
    with pytest.raises(
        ValueError, match="max_len is 25, but must be from 1 to the model's block_size of 24"
    ):
        RollingKVCache(config, window=21, sinks=4)
    cache = RollingKVCache(config, window=6, sinks=2)
    in_chunks(make_model(), prompt(1, 8), cache, [8])
    cache.rewind(5)
    in_chunks(make_model(), prompt(1, 4), cache, [4])
    with pytest.raises(ValueError, match="has rolled on to 9 tokens can only be rewound to 0"):
        cache.rewind(8)
    cache.rewind()
    assert cache.length == 0


# fewer bits


@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([-1, -2]),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
def test_a_number_is_off_by_half_a_step(bits, dim, size, seed):
    x = size * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))
    packed, scale = quantize(x, bits, dim)
    # 8 codes of `bits` bits are `bits` bytes
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, bits)
    back = dequantize(packed, scale, bits, torch.float32)
    step = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**bits - 1)
    # of step and least value, in float16
    rounding = 2**-10 * x.abs().amax(dim, keepdim=True) + 2**-13
    assert ((back - x).abs() <= step / 2 + 2 * rounding).all()


def test_rounding_costs_no_more_in_a_short_format():
    """Code, step and least value are put together in float32, and only then rounded."""
    x = 2 + torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    packed, scale = quantize(x, 8, -1)
    exact, short = (
        dequantize(packed, scale, 8, dtype).float() for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(short, exact.bfloat16().float())


def test_equal_numbers_and_the_ends_of_a_group_are_kept():
    assert torch.equal(
        dequantize(*quantize(torch.full((1, 8), 3.0), 4, -1), 4, torch.float32),
        torch.full((1, 8), 3.0),
    )
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0]])
    for bits in (2, 8):
        torch.testing.assert_close(
            dequantize(*quantize(x, bits, -1), bits, torch.float32), x, atol=2e-3, rtol=0
        )


@given(SPLITS, st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_eight_bits_change_little_however_the_text_is_split(
    make_model, sizes, group, n_kv_head
):
    model, idx = make_model(n_kv_head=n_kv_head), prompt(2, sum(sizes))
    cache = QuantizedKVCache(model.config, B=2, bits=8, group=group)
    found, expected = in_chunks(model, idx, cache, sizes), model(idx)
    assert (found - expected).abs().max() < 0.05 * expected.std()
    assert cache.length == idx.shape[1]


@given(st.integers(1, 23), st.integers(1, 24), st.integers(1, 9), st.sampled_from([2, 4, 8]))
def test_what_the_cache_returns_is_rounded_group_by_group(make_model, before, T, group, bits):
    """Keys of whole groups and values are those of `quantize`, the last keys as they came."""
    T = min(T, 24 - before)
    cache = QuantizedKVCache(make_model().config, bits=bits, group=group)
    other, k, v = torch.randn(
        3, 1, 4, before + T, 8, generator=torch.Generator().manual_seed(T)
    )
    for part in (slice(0, before), slice(before, before + T)):
        # must not show in the second layer
        cache.layer(0).append(other[:, :, part], other[:, :, part])
        keys, values = cache.layer(1).append(k[:, :, part], v[:, :, part])
        cache.advance(part.stop - part.start)
    torch.testing.assert_close(values, dequantize(*quantize(v, bits, -1), bits, torch.float32))
    for first in range(0, before + T, group):
        part = k[:, :, first : first + group]
        whole = part.shape[2] == group
        expected = dequantize(*quantize(part, bits, -2), bits, torch.float32) if whole else part
        torch.testing.assert_close(keys[:, :, first : first + group], expected)


def test_rewinding_into_a_full_group_gives_its_keys_back_rounded(make_model):
    cache = QuantizedKVCache(make_model().config, bits=8, group=4)
    k, v = torch.randn(2, 1, 4, 10, 8)
    for i in range(2):
        cache.layer(i).append(k, v)
    cache.advance(10)
    cache.rewind(6)
    for i in range(2):
        keys, _ = cache.layer(i).append(k[:, :, 6:7], v[:, :, 6:7])
        assert keys.shape[2] == 7
        torch.testing.assert_close(keys, k[:, :, :7], atol=0.03, rtol=0)
    cache.rewind(0)
    cache.rewind(0)
    assert cache.length == 0


@given(
    st.integers(1, 3),
    st.integers(1, 24),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_its_bytes_are_known_before_it_is_made(
    make_model, B, max_len, bits, group, n_kv_head, dtype
):
    config = make_model(n_kv_head=n_kv_head).config
    options = {"B": B, "max_len": max_len, "bits": bits, "group": group, "dtype": dtype}
    cache = QuantizedKVCache(config, **options)
    assert cache.nbytes == quantized_kv_cache_bytes(config, **options)
    assert cache.max_len == max_len


def test_the_bytes_by_hand():
    """GPT-2 small, 4 bits: half a byte a number, and two float16 a group of 32 and a token."""
    numbers = 12 * 12 * 1024 * 64
    scales = numbers // 32 * 4 + numbers // 64 * 4
    waiting = 12 * 12 * 32 * 64 * 4
    assert quantized_kv_cache_bytes(GPT2_SMALL, bits=4) == 2 * numbers // 2 + scales + waiting


def test_a_quantized_cache_refuses_what_it_cannot_do(make_model):
    config = make_model().config
    with pytest.raises(
        ValueError,
        match="bits is 3, but must be 2, 4 or 8, and 8 such codes must fill whole bytes",
    ):
        QuantizedKVCache(config, bits=3)
    with pytest.raises(ValueError, match="group is 0, but must be at least 1"):
        QuantizedKVCache(config, group=0)
    with pytest.raises(ValueError, match="and 1 such codes must fill whole bytes"):
        QuantizedKVCache(make_model(n_embd=4).config, bits=4)
    cache = QuantizedKVCache(config, B=2, max_len=6)
    with pytest.raises(ValueError, match=re.escape("7 tokens do not fit into a cache of 6.")):
        make_model()(prompt(2, 7), cache)
    with pytest.raises(ValueError, match="the model brings batch 1"):
        make_model()(prompt(1, 3), cache)
    with pytest.raises(TypeError, match=r"the model's keys are torch\.bfloat16"):
        make_model().bfloat16()(prompt(2, 3), cache)
    assert cache.length == 0
