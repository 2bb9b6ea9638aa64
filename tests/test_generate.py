"""Sampling against its definition, and the cached text against the naive one."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite.corpus import CharTokenizer
from gptlite.generate import (
    decode_one_token,
    generate,
    prefill,
    probabilities,
    sample,
    stream,
    stream_text,
)
from gptlite.kv_cache import KVCache

LETTERS = CharTokenizer("abcdefghijklmnopq")  # 17, as the tiny model's vocabulary


def prompt(B, T, seed=0):
    return torch.randint(17, (B, T), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


logits_rows = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=9)


# The distribution


@given(logits_rows, st.floats(0.05, 20))
def test_temperature_divides_the_logits(row, temperature):
    logits = torch.tensor([row])
    torch.testing.assert_close(
        probabilities(logits, temperature), (logits / temperature).softmax(-1)
    )


@given(logits_rows, st.data())
def test_top_k_keeps_the_k_likeliest_and_their_ties(row, data):
    k = data.draw(st.integers(1, len(row)))
    logits = torch.tensor([row])
    kept = [
        x >= sorted(row)[-k] for x in row
    ]  # one that ties with the k-th is as good as the k-th
    expected = torch.where(torch.tensor([kept]), logits, -torch.inf).softmax(-1)
    torch.testing.assert_close(probabilities(logits, top_k=k), expected)


@given(logits_rows, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_reach_p(row, top_p):
    """No set of fewer tokens reaches p, the kept one does, and it keeps its proportions."""
    p = torch.tensor([row], dtype=torch.float64).softmax(-1)[0]
    found = probabilities(torch.tensor([row]), top_p=top_p)[0].double()
    kept = found > 0
    n = int(kept.sum())
    rounding = 1e-6
    assert p[kept].sum() >= top_p - rounding
    assert p.sort(descending=True).values[: n - 1].sum() < top_p + rounding
    assert p[kept].min() >= max(p[~kept].tolist(), default=0) - rounding
    torch.testing.assert_close(found[kept], p[kept] / p[kept].sum(), atol=1e-5, rtol=1e-4)


def test_top_p_of_one_keeps_all():
    """The likeliest token's probability rounds to 1, and yet there is another."""
    logits = torch.tensor([[30.0, 0.0]])
    assert torch.equal(probabilities(logits, top_p=1.0), logits.softmax(-1))


def test_top_k_comes_before_top_p():
    """As everywhere: p is a share of what top_k left, here 2/3 and 1/3."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    torch.testing.assert_close(
        probabilities(logits, top_k=2, top_p=0.6), torch.tensor([[1.0, 0, 0, 0]])
    )
    assert (probabilities(logits, top_p=0.6) > 0).sum() == 2


def test_each_row_is_cut_for_itself():
    logits = torch.tensor([[9.0, 0, 0, 0], [1.0, 1, 1, 1], [0, 0, 3, 2.5]])
    assert (probabilities(logits, top_p=0.5) > 0).sum(-1).tolist() == [1, 2, 1]
    assert (probabilities(logits, top_k=1) > 0).sum(-1).tolist() == [1, 4, 1]


@pytest.mark.parametrize("temperature", [1e-2, 1e-37, 1e-320, 5e-324])
def test_a_low_temperature_is_greedy_and_does_not_overflow(temperature):
    logits = torch.tensor([[80.0, 0, -80], [0, 80, 80]])  # float32 ends at 3.4e38
    assert probabilities(logits, temperature).tolist() == [[1, 0, 0], [0, 0.5, 0.5]]


def test_the_nucleus_is_that_of_the_tempered_distribution():
    """Squares of (0.5, 0.3, 0.2) are as 25 : 9 : 4, and roots as 0.71 : 0.55 : 0.45."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    cold = probabilities(logits, temperature=0.5, top_p=0.6)  # 25 / 38 reach it alone
    torch.testing.assert_close(cold, torch.tensor([[1.0, 0, 0]]))
    warm = probabilities(logits, temperature=2, top_p=0.75)  # 0.415 and 0.322 do not reach it
    root = torch.tensor([[0.5, 0.3, 0.2]]).sqrt()
    torch.testing.assert_close(warm, root / root.sum())
    assert (probabilities(logits, top_p=0.75) > 0).sum() == 2


@pytest.mark.parametrize("hidden", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers_are_refused(hidden, temperature):
    """A NaN is larger than anything to argmax: it would be taken for ever."""
    logits = torch.tensor([[0.0, 1.0], [hidden, hidden]])
    with pytest.raises(
        ValueError, match=rf"largest logits are \[1\.0, {hidden}\], but must be"
    ):
        probabilities(logits, temperature)
    with pytest.raises(ValueError, match=r"but must be finite"):
        sample(logits.flip(0), temperature)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.25, 0.25, 0.25, 0.25, 0]),
        ({"top_k": 2}, [0.5, 0, 0.5, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0.5, 0, 0.5, 0, 0]),
    ],
)
def test_an_infinite_temperature_makes_all_that_is_kept_alike(options, expected):
    logits = torch.tensor([[5.0, 1.0, 4.0, 3.0, -torch.inf]])  # the last is hidden
    found = probabilities(logits, temperature=float("inf"), **options)
    kept = [p for p in found[0].tolist() if p]
    assert sorted(kept) == sorted(p for p in expected if p)
    assert found[0, 4] == 0 and found[0, 0] > 0


@pytest.mark.parametrize("top_p", [1e-50, 5e-324, 1e-9])
def test_however_small_the_nucleus_it_has_a_token(top_p):
    logits = torch.tensor([[0.0, 2.0, 1.0], [7.0, 0.0, 7.0]])
    assert (probabilities(logits, top_p=top_p) > 0).sum(-1).tolist() == [1, 1]
    assert probabilities(logits, top_p=top_p)[0, 1] == 1


@given(logits_rows, st.integers(0, 99))
def test_greedy_takes_the_likeliest_and_no_random_number(row, seed):
    logits, generator = torch.tensor([row]), seeded(seed)
    before = generator.get_state()
    token = sample(logits, temperature=0, generator=generator)
    assert token.tolist() == [[row.index(max(row))]]
    assert probabilities(logits, temperature=0).tolist() == [
        [float(i == token) for i in range(len(row))]
    ]
    assert torch.equal(generator.get_state(), before)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    drawn = sample(logits.expand(20_000, -1), top_p=0.85, temperature=0.8, generator=seeded())
    expected = probabilities(logits, top_p=0.85, temperature=0.8)[0]
    assert drawn.shape == (20_000, 1)
    frequency = drawn.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(
        frequency, expected, atol=0.015, rtol=0
    )  # four standard deviations
    assert (frequency[expected == 0] == 0).all()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5, but must be 0 (greedy) or more."),
        ({"temperature": float("nan")}, "temperature is nan, but must be 0 (greedy) or more."),
        ({"top_k": 0}, "top_k is 0, but must be from 1 to the vocabulary's 17."),
        ({"top_k": 18}, "top_k is 18, but must be from 1 to the vocabulary's 17."),
        (
            {"top_k": 0, "temperature": 0},
            "top_k is 0, but must be from 1 to the vocabulary's 17.",
        ),
        ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1."),
        ({"top_p": 1.1}, "top_p is 1.1, but must be above 0 and at most 1."),
    ],
)
def test_sampling_that_makes_no_sense(make_model, sampling, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(torch.zeros(1, 17), **sampling)
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(make_model(), prompt(1, 3), 2, **sampling)


# The text


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 24),
    new=st.integers(0, 30),
    n_kv_head=st.sampled_from([1, 2, 4]),
    sampling=st.sampled_from(
        [{"temperature": 0}, {"top_k": 5}, {"top_p": 0.9, "temperature": 0.7}]
    ),
)
def test_the_cache_changes_nothing_also_past_block_size(
    make_model, B, T, new, n_kv_head, sampling
):
    model, idx = make_model(n_kv_head=n_kv_head), prompt(B, T)
    naive = generate(model, idx, new, generator=seeded(), **sampling)
    cached = generate(
        model, idx, new, KVCache(model.config, B=B), generator=seeded(), **sampling
    )
    assert naive.shape == (B, T + new)
    assert torch.equal(naive[:, :T], idx)
    assert torch.equal(naive, cached)


@torch.no_grad()
def test_naive_generation_draws_from_the_model_after_the_last_block_size_tokens(make_model):
    model, generator = make_model(), seeded()
    text = prompt(2, 5)
    for _ in range(40):
        token = sample(model(text[:, -24:])[:, -1], temperature=2.0, generator=generator)
        text = torch.cat([text, token], dim=1)
    assert torch.equal(
        generate(model, prompt(2, 5), 40, temperature=2.0, generator=seeded()), text
    )


def test_with_a_cache_each_token_is_computed_once(make_model):
    """After the prompt the model reads one token at a time, until its window is full."""
    model, read = make_model(), []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    generate(model, prompt(1, 5), 4, KVCache(model.config))
    generate(model, prompt(1, 5), 4)
    generate(model, prompt(1, 22), 5, KVCache(model.config))
    assert read == [5, 1, 1, 1] + [5, 6, 7, 8] + [22, 1, 1, 24, 24]


def test_no_graph_is_made(make_model):
    model, modes = make_model(), []
    model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    generate(model, prompt(1, 5), 3)
    assert modes == [True] * 3


@torch.no_grad()
def test_prefill_and_decode_are_two_passes_of_the_model(make_model):
    model = make_model()
    idx, cache = prompt(2, 9), KVCache(model.config, B=2)
    torch.testing.assert_close(
        prefill(model, idx[:, :8], cache), model(idx)[:, 7], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        decode_one_token(model, idx[:, 8:], cache), model(idx)[:, 8], atol=1e-5, rtol=1e-5
    )
    assert cache.length == 9


def test_a_seed_gives_the_same_text_and_another_seed_another(make_model):
    model = make_model()
    a, b, c = (generate(model, prompt(1, 3), 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_tokens_come_as_they_are_drawn(make_model):
    model, calls = make_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    tokens = stream(model, prompt(2, 3), 5)
    assert calls == []
    for n, token in enumerate(tokens, 1):
        assert token.shape == (2, 1)
        assert len(calls) == n  # the next token is not computed before it is asked for


def test_between_two_tokens_the_reader_is_not_in_inference_mode(make_model):
    """A generator runs inside its reader's code: what it switches on is off while it waits."""
    model, weight = make_model(), torch.ones(2, requires_grad=True)
    for _ in stream(model, prompt(1, 3), 2):
        assert not torch.is_inference_mode_enabled()
        (weight * weight).sum().backward()
    abandoned = stream(model, prompt(1, 3), 2)
    next(abandoned)
    abandoned.close()
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert weight.grad is not None


def test_a_generated_text_can_be_trained_on(make_model):
    """As distillation does; tensors made in inference mode have no backward pass."""
    model = make_model()
    text = generate(model, prompt(1, 3), 5, KVCache(model.config))
    model(text).sum().backward()
    assert model.wte.weight.grad is not None


def test_the_caller_keeps_its_prompt(make_model):
    idx = prompt(1, 3)
    text = generate(make_model(), idx, 0)
    assert torch.equal(text, prompt(1, 3))
    text[:] = 0
    assert torch.equal(idx, prompt(1, 3))


def test_streamed_text_is_the_generated_text(make_model):
    model = make_model()
    pieces = list(stream_text(model, LETTERS, "bead", 12, KVCache(model.config), temperature=0))
    assert all(len(piece) == 1 for piece in pieces)
    expected = generate(model, LETTERS.encode("bead")[None], 12, temperature=0)[0, 4:]
    assert "".join(pieces) == LETTERS.decode(expected)


def test_a_used_cache_works_again_once_rewound(make_model):
    model = make_model()
    cache = KVCache(model.config)
    first = generate(model, prompt(1, 3), 5, cache, temperature=0)
    with pytest.raises(
        ValueError, match=r"the cache holds 7 tokens of another text; rewind it first\."
    ):
        generate(model, prompt(1, 3), 5, cache)
    cache.rewind(0)
    assert torch.equal(generate(model, prompt(1, 3), 5, cache, temperature=0), first)


def test_of_two_streams_begun_on_one_cache_the_second_is_refused(make_model):
    """Both were begun while it was empty; the second is read when the first has been."""
    model = make_model()
    cache = KVCache(model.config)
    first, second = (
        stream(model, prompt(1, 3, seed), 5, cache, temperature=0) for seed in (0, 1)
    )
    expected = generate(model, prompt(1, 3), 5, temperature=0)[:, 3:]
    assert torch.equal(torch.cat(list(first), 1), expected)
    with pytest.raises(
        ValueError, match=r"the cache holds 7 tokens of another text; rewind it first\."
    ):
        next(second)


def test_a_stream_whose_cache_has_read_something_else_is_refused(make_model):
    model = make_model()
    cache = KVCache(model.config)
    tokens = stream(model, prompt(1, 3), 5, cache)
    next(tokens)
    prefill(model, prompt(1, 4), cache)
    with pytest.raises(
        ValueError, match=r"holds 7 tokens .* this one left 3, so give each its"
    ):
        next(tokens)


@pytest.mark.parametrize(
    ("idx", "new", "message"),
    [
        (prompt(1, 0), 1, "the prompt has 0 tokens, but must have from 1 to block_size = 24."),
        (
            prompt(1, 25),
            1,
            "the prompt has 25 tokens, but must have from 1 to block_size = 24.",
        ),
        (
            prompt(1, 3)[0],
            1,
            "the prompt's shape is (3,), but must be (B, T); idx[None] is a batch of 1.",
        ),
        (prompt(1, 3), -1, "max_new_tokens is -1, but must be at least 0."),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_computed(make_model, idx, new, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(make_model(), idx, new)  # not even asked for a token


def test_a_cache_that_is_too_short_is_refused_at_once_and_one_that_just_fits_works(make_model):
    model = make_model()
    with pytest.raises(
        ValueError, match=r"the cache has no room for the 7 tokens that it has to hold\."
    ):
        stream(model, prompt(1, 4), 4, KVCache(model.config, max_len=6))
    # the last of the eight tokens is read by nobody
    fits = generate(model, prompt(1, 4), 4, KVCache(model.config, max_len=7), temperature=0)
    assert torch.equal(fits, generate(model, prompt(1, 4), 4, temperature=0))


def test_a_cache_for_another_batch(make_model):
    model = make_model()
    with pytest.raises(
        ValueError, match=r"the model brings batch 2, .* but the cache is for batch 1"
    ):
        generate(model, prompt(2, 3), 1, KVCache(model.config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the prompt is empty; give at least one character."),
        (
            "b\N{GREEK SMALL LETTER ALPHA}d!",
            "the text has characters that the vocabulary lacks: '!', 'α'.",
        ),
        ("b" * 25, "the prompt has 25 tokens, but must have from 1 to block_size = 24."),
    ],
)
def test_bad_texts_are_refused_at_once(make_model, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stream_text(make_model(), LETTERS, text, 3)


def test_an_unknown_option_is_not_swallowed(make_model):
    with pytest.raises(TypeError, match="temprature"):
        generate(make_model(), prompt(1, 3), 1, temprature=0)
