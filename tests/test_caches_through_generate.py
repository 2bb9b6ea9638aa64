"""Every class of cache through `generate`, against loops that know nothing of caches."""

import math
from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gptlite.generate import generate, stream
from gptlite.kv_cache import KVCache, StaticKVCache
from gptlite.model import GPT
from gptlite.smaller_caches import QuantizedKVCache, RollingKVCache

LONGEST = 24  # the tiny model's block_size


def prompt(B, T, seed=0):
    return torch.randint(17, (B, T), generator=torch.Generator().manual_seed(seed))


def seeded():
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def naive_logits(model, text, first):
    """Logits (B, new, V) of each token of a text from the `first` on, computed by itself."""
    windows = [text[:, max(0, n - LONGEST) : n] for n in range(first, text.shape[1])]
    return torch.stack([model(window)[:, -1] for window in windows], 1)


@torch.no_grad()
def rolling_logits(model, text, first, window, sinks):
    """The same of a model with positions for the whole text, by attention with a mask.

    The rows of its table are the model's, and, past the last, those after the sinks' again.
    """
    T = text.shape[1]
    rows = [*range(sinks), *islice(cycle(range(sinks, LONGEST)), T)][:T]

    def attention(q, k, v, mask=None):
        H = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(H, 1), v.repeat_interleave(H, 1)
        seen = [[j <= i and (j < sinks or j > i - window) for j in range(T)] for i in range(T)]
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + torch.tensor(seen).float().log()
        return scores.softmax(-1) @ v

    long = GPT(replace(model.config, block_size=T), attention).eval()
    state = model.state_dict()
    long.load_state_dict(state | {"wpe.weight": state["wpe.weight"][rows]})
    return long(text)[:, first - 1 : -1]


def short_of_the_best(logits, text, first):
    """How much less than the largest logit each chosen token has, at most."""
    chosen = logits.gather(-1, text[:, first:, None])[..., 0]
    return (logits.amax(-1) - chosen).max().item()


texts = {"B": st.integers(1, 3), "T": st.integers(1, LONGEST), "new": st.integers(1, 34)}
heads = st.sampled_from([1, 2, 4])


@given(
    **texts,
    n_kv_head=heads,
    Cache=st.sampled_from([KVCache, StaticKVCache]),
    just_fits=st.booleans(),
    sampling=st.sampled_from([{"temperature": 0}, {"top_p": 0.9, "temperature": 0.7}]),
)
def test_exact_caches_give_the_text_of_the_naive_loop(
    make_model, B, T, new, n_kv_head, Cache, just_fits, sampling
):
    model, idx = make_model(n_kv_head=n_kv_head), prompt(B, T)
    max_len = min(T + new - 1, LONGEST) if just_fits else None
    cache = Cache(model.config, B=B, max_len=max_len)
    text = generate(model, idx, new, cache, generator=seeded(), **sampling)
    assert torch.equal(text, generate(model, idx, new, generator=seeded(), **sampling))
    assert torch.equal(text[:, :T], idx)


@given(**texts, n_kv_head=heads, window=st.integers(1, 20), sinks=st.integers(0, 4))
def test_a_rolling_cache_gives_the_text_of_attention_under_a_window(
    make_model, B, T, new, n_kv_head, window, sinks
):
    """Also past block_size, where it goes on instead of reading its window anew."""
    model, idx = make_model(n_kv_head=n_kv_head), prompt(B, T)
    cache = RollingKVCache(model.config, B=B, window=window, sinks=sinks)
    text = generate(model, idx, new, cache, temperature=0)
    logits = rolling_logits(model, text, T, window, sinks)
    assert short_of_the_best(logits, text, T) < 1e-3
    assert cache.length == T + new - 1


@given(B=st.integers(1, 2), T=st.integers(1, 12), new=st.integers(1, 12), n_kv_head=heads)
def test_a_rolling_cache_with_a_window_that_is_long_enough_gives_the_naive_text(
    make_model, B, T, new, n_kv_head
):
    model, idx = make_model(n_kv_head=n_kv_head), prompt(B, T)
    cache = RollingKVCache(model.config, B=B, window=LONGEST - 4, sinks=4)
    text = generate(model, idx, new, cache, generator=seeded())
    assert torch.equal(text, generate(model, idx, new, generator=seeded()))


@given(**texts, n_kv_head=heads, group=st.integers(1, 9))
def test_a_quantized_cache_chooses_nearly_the_best_token(
    make_model, B, T, new, n_kv_head, group
):
    model, idx = make_model(n_kv_head=n_kv_head), prompt(B, T)
    cache = QuantizedKVCache(model.config, B=B, bits=8, group=group)
    text = generate(model, idx, new, cache, temperature=0)
    logits = naive_logits(model, text, T)
    # each of two logits may be off by a twentieth of their spread
    assert short_of_the_best(logits, text, T) < 0.1 * logits.std()


CACHES = {
    "growing": KVCache,
    "static": StaticKVCache,
    "rolling": lambda config, **o: RollingKVCache(config, window=6, sinks=2, **o),
    "quantized": lambda config, **o: QuantizedKVCache(config, bits=4, group=8, **o),
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@given(
    before=st.integers(1, 12),
    failed=st.integers(1, 12),
    after=st.integers(1, 12),
    layer=st.integers(0, 1),
    back=st.integers(0, 12),
)
@example(before=8, failed=1, after=3, layer=1, back=5)  # a rolling cache that is just full
@torch.no_grad()
def test_a_call_that_fails_leaves_every_cache_as_it_was(
    make_model, make, before, failed, after, layer, back
):
    """Its twin, which never heard of the call, goes on and is rewound in the same way."""
    model = make_model()
    cache, twin = make(model.config), make(model.config)
    for c in (cache, twin):
        model(prompt(1, before), c)
    hook = model.h[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(1, failed, seed=1), cache)
    hook.remove()
    assert cache.length == twin.length == before
    back = min(back, before)
    if back < before and not (isinstance(cache, RollingKVCache) and before > cache.max_len):
        for c in (cache, twin):
            c.rewind(back)
    found, expected = (model(prompt(1, after, seed=2), c) for c in (cache, twin))
    assert torch.equal(found, expected)
    found, expected = (model(prompt(1, 1), c) for c in (cache, twin))
    assert torch.equal(found, expected)


def fail(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_of_two_texts_begun_on_one_empty_cache_the_second_is_refused(make_model, make):
    model = make_model()
    cache = make(model.config)
    first, second = (stream(model, prompt(1, 3, seed), 4, cache) for seed in (0, 1))
    list(first)
    with pytest.raises(ValueError, match="holds 6 tokens of another text; rewind it first"):
        next(second)


@torch.no_grad()
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_cache_for_a_longer_model_is_refused(make_model, make):
    """Its next token could have a position that the model lacks."""
    model = make_model(block_size=7)
    with pytest.raises(ValueError, match="tokens are more than the model's block_size of 7"):
        model(prompt(1, 1), make(make_model().config))
