"""The timer calls what it should as often as it should, and counts time and memory exactly."""

import itertools
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite import bench
from gptlite.bench import (
    GenerationTiming,
    Timing,
    measure,
    measure_alternately,
    measure_decoding,
    measure_generation,
    peak_memory,
    ratio,
)
from gptlite.kv_cache import KVCache, kv_cache_bytes
from gptlite.model import naive_attention, sdpa_attention

CPU = torch.device("cpu")


def test_measure_calls_after_warming_up_and_keeps_every_time():
    calls = []
    t = measure(lambda: calls.append(0), repeats=5, warmup=3)
    assert len(calls) == 8
    assert len(t.times) == 5
    assert t.low <= t.median <= t.high
    assert t.median == statistics.median(t.times)


def test_functions_take_turns():
    calls = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = measure_alternately(fns, repeats=3, warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" * 3
    assert {name: len(t.times) for name, t in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_device_is_waited_for_before_and_after(monkeypatch):
    events = []
    monkeypatch.setattr(bench, "synchronize", lambda device: events.append(str(device)))
    measure(lambda: events.append("call"), repeats=2, warmup=1, device=CPU)
    assert events == ["call"] + ["cpu", "call", "cpu"] * 2


def test_decoding_takes_turns_and_reads_on_after_the_same_past(make_model, monkeypatch):
    models, read = {"small": make_model(), "large": make_model(n_layer=3)}, []
    step = bench.decode_one_token

    def watched(model, token, cache):
        read.append((model.config.n_layer, cache.length))
        assert token.shape == (1, 1) and torch.is_inference_mode_enabled()
        return step(model, token, cache)

    monkeypatch.setattr(bench, "decode_one_token", watched)
    timed = measure_decoding(models, context=5, new=3, repeats=2)
    assert read == [
        (n, 5 + i) for n in (2, 3, 2, 3, 2, 3) for i in range(3)
    ]  # a round to warm up, and two that count
    assert {n: len(t.times) for n, t in timed.items()} == {"small": 2, "large": 2}


def test_a_token_s_time_is_the_round_s_over_the_tokens_that_were_read(make_model, monkeypatch):
    """A clock that only steps move: the rounds take 1, 2, 3 s, then 4, 5, 6 s, ... by hand."""
    seconds, now = itertools.count(1), [0]

    def step(model, token, cache):
        now[0] += next(seconds) * 10**9
        cache.advance(1)

    monkeypatch.setattr(bench, "decode_one_token", step)
    monkeypatch.setattr(bench.time, "perf_counter_ns", lambda: now[0])
    timed = measure_decoding({"it": make_model()}, context=5, new=3, repeats=2)
    assert timed["it"].times == (5.0, 8.0)  # after a round to warm up: (4 + 5 + 6) / 3, ...


@pytest.mark.parametrize(
    "wrong", [{"context": 0}, {"context": 4, "new": 0}, {"context": 4, "repeats": 0}]
)
def test_decoding_of_nothing_is_refused(make_model, wrong):
    (name, _), *_ = reversed(wrong.items())
    with pytest.raises(ValueError, match=f"{name} is 0, but must be at least 1."):
        measure_decoding({"it": make_model()}, **wrong)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"repeats": 0}, "repeats is 0, but must be at least 1."),
        ({"repeats": -3}, "repeats is -3, but must be at least 1."),
        ({"warmup": -1}, "warmup is -1, but must be at least 0."),
    ],
)
def test_impossible_counts_are_refused_before_anything_runs(kwargs, said):
    with pytest.raises(ValueError) as error:
        measure(lambda: pytest.fail("was called"), **kwargs)
    assert str(error.value) == said


def test_an_error_of_the_function_is_the_caller_s():
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0, CPU)
    assert peak_memory(lambda: torch.ones(16), CPU) == 64  # and the profiler can still be used


def test_nothing_to_measure_gives_nothing():
    assert measure_alternately({}) == {}


@given(st.lists(st.floats(1e-9, 1e3), min_size=2, max_size=30))
def test_median_and_quartiles_are_those_of_the_standard_library(times):
    low, median, high = statistics.quantiles(times, method="inclusive")
    t = Timing.of(times)
    assert (t.low, t.median, t.high) == pytest.approx((low, median, high))


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1.0, 100.0)),
        min_size=1,
        max_size=20,
    )
)
def test_a_slow_round_cancels_in_the_ratio(rounds):
    slowed = ratio(
        Timing.of([a * slow for a, b, slow in rounds]),
        Timing.of([b * slow for a, b, slow in rounds]),
    )
    calm = ratio(Timing.of([a for a, b, _ in rounds]), Timing.of([b for a, b, _ in rounds]))
    assert slowed.ratios == pytest.approx(calm.ratios)
    assert (slowed.median, slowed.low, slowed.high) == pytest.approx(
        (calm.median, calm.low, calm.high)
    )


def test_ratio_is_of_rounds_and_not_of_medians():
    a, b = Timing.of([1.0, 20.0, 3.0]), Timing.of([1.0, 10.0, 1.0])
    assert ratio(a, b).ratios == (1.0, 2.0, 3.0)
    assert ratio(a, b).median == 2.0 != a.median / b.median
    with pytest.raises(
        ValueError, match=r"^the timings have 3 and 2 rounds, but must have as many each\.$"
    ):
        ratio(a, Timing.of([1.0, 2.0]))


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ([2.0, 2.0, 2.0], "2.00 s (2.00 to 2.00)"),
        ([0.012, 0.0123, 0.0126], "12.3 ms (12.2 to 12.4)"),
        ([4e-6], "4.00 µs (4.00 to 4.00)"),
        ([9e-4, 9e-4, 2.0], "900 µs (900 to 1,000,450)"),
    ],
)
def test_a_timing_reads_in_one_unit(times, text):
    assert str(Timing.of(times)) == text


def test_a_ratio_reads_as_a_factor():
    assert (
        str(ratio(Timing.of([5.0, 10.0, 12.0]), Timing.of([1.0, 2.0, 2.0])))
        == "5.00x (5.00 to 5.50)"
    )


# --- generation ---


@pytest.mark.parametrize("cached", [False, True])
def test_generation_splits_the_first_token_from_the_rest(make_model, cached):
    model, caches = make_model(), []

    def make_cache():
        caches.append(KVCache(model.config, B=2))
        return caches[-1]

    n, repeats = 6, 3
    g = measure_generation(
        model, torch.zeros(2, 5, dtype=torch.long), n, make_cache if cached else None, repeats
    )
    assert len(g.first.times) == len(g.per_token.times) == len(g.total.times) == repeats
    for first, per_token, total in zip(
        g.first.times, g.per_token.times, g.total.times, strict=True
    ):
        assert first + per_token * (n - 1) == pytest.approx(total)
    assert len(g.steps) == n
    assert g.steps[0] == g.first.median
    assert g.batch == 2
    assert g.tokens_per_second == 2 / g.per_token.median
    assert len(caches) == (
        repeats + 1 if cached else 0
    )  # a fresh one each run, the warm-up's included
    assert [c.length for c in caches] == (
        [6] + [10] * repeats if cached else []
    )  # the last token is never read


def test_generation_runs_past_the_window(make_model):
    model = make_model(block_size=8)
    g = measure_generation(
        model, torch.zeros(1, 6, dtype=torch.long), 5, lambda: KVCache(model.config), 1
    )
    assert len(g.steps) == 5


def test_generation_calls_the_model_on_what_it_should(make_model):
    model, lengths = make_model(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    measure_generation(model, torch.zeros(1, 4, dtype=torch.long), 3, repeats=1)
    assert lengths == [4, 5] + [4, 5, 6]
    lengths.clear()
    measure_generation(
        model, torch.zeros(1, 4, dtype=torch.long), 3, lambda: KVCache(model.config), repeats=1
    )
    assert lengths == [4, 1] + [4, 1, 1]


@pytest.mark.parametrize(
    ("n", "repeats", "name"),
    [(1, 3, "max_new_tokens"), (0, 3, "max_new_tokens"), (4, 0, "repeats")],
)
def test_generation_refuses_what_has_no_second_token(make_model, n, repeats, name):
    with pytest.raises(ValueError, match=f"^{name} is [01], but must be at least [12]"):
        measure_generation(
            make_model(), torch.zeros(1, 4, dtype=torch.long), n, repeats=repeats
        )


def test_generation_reads_as_a_sentence():
    g = GenerationTiming(
        Timing.of([0.04]), Timing.of([0.02]), Timing.of([0.06]), (0.04, 0.02), 3
    )
    assert (
        str(g)
        == "first token 40.0 ms (40.0 to 40.0), then 20.0 ms (20.0 to 20.0) each: 150 tokens/s"
    )


# --- memory ---


def test_memory_counts_what_lives_at_once():
    def fn():
        a = torch.ones(1000)  # 4,000 bytes
        b = torch.ones(2000, dtype=torch.float64)  # 16,000
        del a
        c = torch.ones(500, dtype=torch.int8)  # 500: 20,000 were live before, 16,500 now
        return b, c

    assert peak_memory(fn, CPU) == 20_000


def test_memory_of_one_after_another_is_that_of_the_largest():
    assert peak_memory(lambda: [len(torch.ones(n)) for n in (10, 1000, 100)], CPU) == 4000


def test_nothing_allocated_is_nothing():
    kept = torch.ones(100)
    assert peak_memory(kept.neg_, CPU) == 0
    assert peak_memory(lambda: None, CPU) == 0


def test_freeing_what_is_older_does_not_hide_what_is_new():
    kept = [torch.ones(100_000)]

    def fn():
        kept.clear()
        return torch.ones(1000)

    assert peak_memory(fn, CPU) == 4000


def test_blocks_that_an_earlier_profile_saw_do_not_confuse_a_later_one():
    """PyTorch's allocator remembers a block of one profile that was freed after it."""
    kept = []
    for _ in range(3):
        assert peak_memory(lambda: kept.append(torch.ones(1000)), CPU) == 4000
        assert peak_memory(lambda: (kept.clear(), torch.ones(1000)), CPU) == 4000


def test_memory_of_a_cache_is_what_it_says(make_model):
    config = make_model().config
    assert peak_memory(lambda: KVCache(config, B=3, max_len=7), CPU) == kv_cache_bytes(
        config, B=3, max_len=7
    )


@pytest.mark.parametrize("T", [32, 64, 128])
def test_naive_attention_holds_two_squares_of_scores(T):
    H, D = 2, 8
    q = torch.randn(1, H, T, D)
    square = 4 * H * T * T  # float32 scores
    peak = peak_memory(lambda: naive_attention(q, q, q), CPU)
    # masked_fill and softmax hold their input and their output; beside them at most copies of
    # q, k, v and two masks
    assert 2 * square <= peak <= 2 * square + 2 * T * T + 5 * q.nbytes + 1024


def test_fused_attention_never_holds_a_square():
    q = torch.randn(1, 2, 1024, 8)
    assert peak_memory(lambda: sdpa_attention(q, q, q), CPU) < 4 * 2 * 1024 * 1024 / 4


def test_highest_follows_addresses_in_the_order_of_time():
    def event(ts, address, size):
        return {"ts": ts, "args": {"Addr": address, "Bytes": size}}

    events = [
        event(4, 1, -10),
        event(1, 1, 10),
        event(2, 2, 5),
        event(3, 9, -1000),
        event(5, 1, 7),
        event(6, 2, -5),
    ]
    assert bench._highest(events) == 15
    assert bench._highest([]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_a_gpu():
    kept = torch.ones(1 << 20, device="cuda")
    peak = peak_memory(lambda: kept + 1, torch.device("cuda"))
    assert peak == kept.nbytes
