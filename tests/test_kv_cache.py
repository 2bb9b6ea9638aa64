"""The cache changes what is computed, never the answer, or it refuses in a sentence."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite.kv_cache import KVCache, LayerCache, StaticKVCache, kv_cache_bytes, kv_cache_shape
from gptlite.model import GPT2_SMALL, GPTConfig, naive_attention, sdpa_attention

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
both_caches = pytest.mark.parametrize("Cache", [KVCache, StaticKVCache])


def prompt(B, T, seed=0):
    return torch.randint(17, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_chunks(model, idx, cache, sizes):
    """Logits of idx read into the cache in pieces of the given sizes."""
    return torch.cat([model(piece, cache) for piece in idx.split(sizes, dim=1)], dim=1)


def cuts(T):
    """Strategy: the sizes of the pieces of T tokens, cut anywhere."""
    return st.sets(st.integers(1, T - 1)).map(
        lambda at: [b - a for a, b in pairwise([0, *sorted(at), T])]
    )


@given(
    st.integers(2, 24).flatmap(lambda T: st.tuples(st.just(T), cuts(T))),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([naive_attention, sdpa_attention]),
    st.sampled_from([KVCache, StaticKVCache]),
)
def test_any_split_of_the_prompt_gives_the_logits_of_one_pass(
    make_model, split, B, n_kv_head, attention, Cache
):
    (T, sizes), model = split, make_model(n_kv_head=n_kv_head).set_attention(attention)
    idx, cache = prompt(B, T), Cache(model.config, B=B)
    torch.testing.assert_close(in_chunks(model, idx, cache, sizes), model(idx), **CLOSE)
    assert cache.length == T


@given(st.data(), st.sampled_from([KVCache, StaticKVCache]))
def test_rewinding_and_going_on_equals_a_fresh_text(make_model, data, Cache):
    """A text is read, part of it forgotten, and another end read instead, several times."""
    model = make_model(n_kv_head=2)
    cache, text = Cache(model.config, B=2), torch.empty(2, 0, dtype=torch.long)
    for seed in range(data.draw(st.integers(1, 4))):
        keep = data.draw(st.integers(0, text.shape[1]))
        cache.rewind(keep)
        end = prompt(2, data.draw(st.integers(1, 24 - keep)) if keep < 24 else 0, seed)
        text = torch.cat([text[:, :keep], end], dim=1)
        if end.shape[1]:
            logits = in_chunks(
                model, end, cache, data.draw(cuts(end.shape[1])) if end.shape[1] > 1 else [1]
            )
            torch.testing.assert_close(logits, model(text)[:, keep:], **CLOSE)
    assert cache.length == text.shape[1]


@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 24),
    st.sampled_from(["float32", "float16"]),
)
def test_its_size_is_known_before_it_is_made(B, n_kv_head, max_len, dtype):
    config = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=24, n_kv_head=n_kv_head)
    cache = KVCache(config, B=B, max_len=max_len, dtype=getattr(torch, dtype))
    assert cache.k.shape == cache.v.shape == (2, B, n_kv_head, max_len, 8)
    allocated = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
    known = kv_cache_bytes(config, B=B, max_len=max_len, dtype=getattr(torch, dtype))
    assert known == cache.nbytes == allocated
    assert (cache.max_len, cache.length) == (max_len, 0)


def test_bytes_of_gpt2_small_by_hand():
    assert (
        kv_cache_bytes(GPT2_SMALL, B=3, max_len=1, dtype=torch.float16)
        == 3 * 2 * 12 * 12 * 64 * 2
    )
    # max_len is block_size where none is given
    assert kv_cache_shape(GPT2_SMALL) == (12, 1, 12, 1024, 64)


@both_caches
def test_its_bytes_are_as_many_with_static_shapes(make_model, Cache):
    config = make_model().config
    cache = Cache(config, B=2, max_len=7, dtype=torch.float16)
    assert cache.nbytes == kv_cache_bytes(config, B=2, max_len=7, dtype=torch.float16)
    assert (cache.max_len, cache.length) == (7, 0)


def test_nothing_is_allocated_while_it_fills(make_model):
    model = make_model()
    cache = KVCache(model.config)
    k, v = cache.k.data_ptr(), cache.v.data_ptr()
    seen, _ = LayerCache(cache.k[0], cache.v[0], 0).append(
        torch.ones(1, 4, 3, 8), torch.ones(1, 4, 3, 8)
    )
    assert seen.data_ptr() == k  # a view of the cache, not a copy
    in_chunks(model, prompt(1, 24), cache, [5, 1, 18])
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == (k, v)


def test_static_shapes_and_numbers_do_not_change_as_it_fills(make_model):
    """No tensor moves or changes its shape, no Python number moves: no new compiling."""
    model = make_model()
    cache = StaticKVCache(model.config)
    model(prompt(1, 1), cache)

    def seen(layer):
        k, v = layer.append(torch.ones(1, 4, 1, 8), torch.ones(1, 4, 1, 8))
        return (
            k.shape,
            k.data_ptr(),
            v.shape,
            v.data_ptr(),
            layer.mask(1).shape,
            id(layer.length),
        )

    before = [seen(cache.layer(i)) for i in (0, 1)]
    in_chunks(model, prompt(1, 20), cache, [5, 1, 14])
    assert [seen(cache.layer(i)) for i in (0, 1)] == before
    assert cache.length == 21


def test_what_is_read_into_an_empty_static_cache_sees_only_itself(make_model):
    """It is most of what attention works on, and the rest of the cache would be masked."""
    model = make_model()
    cache, k = StaticKVCache(model.config), torch.ones(1, 4, 3, 8)
    for emptied in range(2):
        assert cache.layer(0).append(k, k)[0].shape == k.shape, emptied
        assert cache.layer(0).mask(3) is None
        model(prompt(1, 3), cache)
        assert cache.layer(0).append(k, k)[0].shape == (1, 4, 24, 8)
        cache.rewind(2)
        assert cache.layer(0).mask(3).tolist() == [
            [key <= 2 + query for key in range(24)] for query in range(3)
        ]
        cache.rewind()


def test_half_precision_holds_what_the_model_computes(make_model):
    model = make_model().half()
    idx, cache = prompt(1, 9), KVCache(model.config, dtype=torch.float16)
    torch.testing.assert_close(
        in_chunks(model, idx, cache, [4, 1, 4]), model(idx), atol=0.05, rtol=0.05
    )


def test_the_cache_does_not_keep_the_graph_of_past_steps(make_model):
    """Outside of `no_grad`, it holds values alone; else the memory of each step would stay."""
    model = make_model()
    cache = KVCache(model.config)
    model(prompt(1, 5), cache)
    assert not cache.k.requires_grad
    assert not cache.v.requires_grad
    torch.testing.assert_close(
        model(prompt(1, 9)[:, 5:], cache).detach(), model(prompt(1, 9))[:, 5:].detach(), **CLOSE
    )


def test_a_cache_used_in_inference_mode_can_be_used_outside_of_it(make_model):
    model = make_model()
    cache = KVCache(model.config)
    with torch.inference_mode():
        model(prompt(1, 4), cache)
    in_chunks(model, prompt(1, 2), cache, [1, 1])
    assert cache.length == 6


BRINGS = "the model brings batch 1, 2 KV heads of size 8, but the cache is for "
HOLDS = "the model's keys are torch.float32 on cpu, but the cache holds "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": 2}, BRINGS + "batch 2, 2 KV heads of size 8."),
        ({"n_kv_head": 4}, BRINGS + "batch 1, 4 KV heads of size 8."),
        ({"n_embd": 16}, BRINGS + "batch 1, 2 KV heads of size 4."),
        ({"n_layer": 1}, "the model has more layers than the 1 that the cache is for."),
        ({"max_len": 6}, "7 tokens do not fit into a cache of 6."),
        ({"dtype": torch.float16}, HOLDS + "torch.float16 on cpu."),
    ],
)
@both_caches
def test_another_cache_is_refused_in_one_sentence_and_unharmed(
    make_model, change, message, Cache
):
    model = make_model(n_kv_head=2)
    shape = {"n_layer": 2, "n_embd": 32, "n_kv_head": 2} | {
        k: v for k, v in change.items() if k.startswith("n_")
    }
    made = {k: v for k, v in change.items() if not k.startswith("n_")}
    cache = Cache(GPTConfig(n_head=4, block_size=24, vocab_size=17, **shape), **made)
    with pytest.raises((ValueError, TypeError)) as error:
        model(prompt(1, 7), cache)
    assert str(error.value) == message
    assert cache.length == 0


def test_a_cache_on_another_device_is_refused(make_model):
    model, cache = (
        make_model(n_kv_head=2),
        KVCache(make_model(n_kv_head=2).config, device="meta"),
    )
    with pytest.raises(TypeError, match=re.escape(HOLDS + "torch.float32 on meta.")):
        model(prompt(1, 7), cache)
    static = StaticKVCache(model.config)  # its length has to be somewhere
    static.k = [k.to("meta") for k in static.k]
    with pytest.raises(TypeError, match=re.escape(HOLDS + "torch.float32 on meta.")):
        model(prompt(1, 7), static)


@pytest.mark.parametrize("T", [1, 2])
def test_a_layer_refuses_what_it_has_no_room_for(make_model, T):
    """A slice past the end is empty, and one token would vanish into it without a word."""
    layer = KVCache(make_model().config, max_len=5).layer(0)
    full = LayerCache(layer.k, layer.v, 5)
    with pytest.raises(
        ValueError, match=re.escape(f"{5 + T} tokens do not fit into a cache of 5.")
    ):
        full.append(torch.ones(1, 4, T, 8), torch.ones(1, 4, T, 8))


@both_caches
@torch.no_grad()
def test_after_a_refusal_the_cache_goes_on_as_if_nothing_had_happened(make_model, Cache):
    model = make_model()
    idx, cache = prompt(1, 24), Cache(model.config, max_len=12)
    model(idx[:, :10], cache)
    for bad in (prompt(1, 3, seed=1), prompt(2, 1, seed=1)):
        with pytest.raises(ValueError, match=r"do not fit|batch 2"):
            model(bad, cache)
    assert cache.length == 10
    torch.testing.assert_close(model(idx[:, 10:12], cache), model(idx[:, :12])[:, 10:], **CLOSE)


@both_caches
@torch.no_grad()
def test_a_failure_in_a_later_layer_leaves_the_cache_usable(make_model, Cache):
    """All layers move on together or not at all, though the first has written its keys."""
    model = make_model()
    idx, cache = prompt(1, 12), Cache(model.config)
    model(idx[:, :6], cache)
    hook = model.h[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        model(prompt(1, 4, seed=1), cache)
    hook.remove()
    torch.testing.assert_close(model(idx[:, 6:], cache), model(idx)[:, 6:], **CLOSE)


@both_caches
@torch.no_grad()
def test_past_block_size_nothing_is_silently_wrong(make_model, Cache):
    model = make_model()
    cache = Cache(model.config)
    model(prompt(1, 23), cache)
    with pytest.raises(ValueError, match=re.escape("25 tokens do not fit into a cache of 24.")):
        model(prompt(1, 2), cache)
    assert cache.length == 23
    model(prompt(1, 1), cache)  # the 24th still fits
    with pytest.raises(ValueError, match=re.escape("25 tokens do not fit into a cache of 24.")):
        model(prompt(1, 1), cache)


@both_caches
@torch.no_grad()
def test_two_caches_of_one_model_do_not_know_of_each_other(make_model, Cache):
    model = make_model()
    a, b, one, two = (
        prompt(1, 8),
        prompt(1, 8, seed=1),
        Cache(model.config),
        Cache(model.config),
    )
    for t in range(8):
        last = model(a[:, t : t + 1], one), model(b[:, t : t + 1], two)
    torch.testing.assert_close(last[0], model(a)[:, -1:], **CLOSE)
    torch.testing.assert_close(last[1], model(b)[:, -1:], **CLOSE)


@both_caches
@torch.no_grad()
def test_a_cache_longer_than_the_models_window_is_refused(make_model, Cache):
    cache = Cache(replace(make_model().config, block_size=25))
    with pytest.raises(
        ValueError, match=re.escape("25 tokens are more than the model's block_size of 24.")
    ):
        make_model()(prompt(1, 1), cache)


@pytest.mark.parametrize("max_len", [0, -1, 25])
def test_a_length_that_the_model_has_no_positions_for(make_model, max_len):
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"max_len is {max_len}, but must be from 1 to the model's block_size of 24."
        ),
    ):
        KVCache(make_model().config, max_len=max_len)


def test_a_batch_of_none(make_model):
    with pytest.raises(ValueError, match=re.escape("the batch is 0, but must be at least 1.")):
        KVCache(make_model().config, B=0)


@pytest.mark.parametrize("length", [-1, 1, 25])
def test_rewinding_forward_is_refused(make_model, length):
    cache = KVCache(make_model().config)
    with pytest.raises(
        ValueError, match=re.escape(f"a cache of 0 tokens cannot be rewound to {length}.")
    ):
        cache.rewind(length)
