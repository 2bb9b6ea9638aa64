"""The costs are those of the model that runs, counted on it and not on paper."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gptlite.costs import Cost, decode_cost, naive_cost, operator_costs, prefill_cost
from gptlite.kv_cache import KVCache, kv_cache_bytes
from gptlite.model import GPT, GPT2_SMALL, GPT2_XL, GPTConfig, naive_attention, sdpa_attention


@st.composite
def steps(draw):
    """Strategy: a tiny shape, and Tq queries among Tk keys of B sequences."""
    kv, group, D = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    H = kv * group
    config = GPTConfig(draw(st.integers(1, 3)), H, H * D, 16, draw(st.integers(1, 40)), kv)
    if draw(st.booleans()):  # as pruning may leave it
        config = replace(
            config, head_size=draw(st.integers(1, 5)), n_hidden=draw(st.integers(1, 20))
        )
    Tk = draw(st.integers(1, 16))
    return config, draw(st.integers(1, Tk)), Tk, draw(st.integers(1, 3))


def total(costs):
    return sum(costs.values(), Cost())


class Launches(TorchDispatchMode):
    """The names of the operators that launch something: views share their input's memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        shared = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if func._schema.is_mutable or first.untyped_storage().data_ptr() not in shared:
            self.names.append(func.overloadpacket.__name__)
        return out


@torch.no_grad()
def run(config, Tq, Tk, B, cache, last_only, attention, mode):
    """One forward pass of a real model, seen by `mode`."""
    model = GPT(config, attention).eval()
    cache = KVCache(config, B=B) if cache else None
    if Tk > Tq:
        model(torch.zeros(B, Tk - Tq, dtype=torch.long), cache)
    idx = torch.zeros(B, Tq, dtype=torch.long)
    with mode:
        model(idx, cache, last_only)
    return mode


@pytest.mark.parametrize("attention", [naive_attention, sdpa_attention])
@settings(max_examples=30, deadline=None)
@given(steps(), st.booleans())
def test_flops_are_those_that_pytorch_counts(attention, step, last_only):
    # PyTorch's counter does not know its fused CPU kernel, so the same call is counted as the
    # products it stands for
    with sdpa_kernel(SDPBackend.MATH):
        counted = run(
            *step, True, last_only, attention, FlopCounterMode(display=False)
        ).get_total_flops()
    assert total(operator_costs(*step, last_only=last_only)).flops == counted


@settings(max_examples=15, deadline=None)
@given(steps())
def test_flops_of_each_operator_are_those_that_pytorch_counts(step):
    with sdpa_kernel(SDPBackend.MATH):
        counted = run(
            *step, True, True, naive_attention, FlopCounterMode(display=False)
        ).get_flop_counts()
    costs = operator_costs(*step)
    for ours, theirs in (
        ("c_attn", "attn.c_attn"),
        ("attn.c_proj", "attn.c_proj"),
        ("c_fc", "mlp.c_fc"),
    ):
        assert costs[ours].flops == sum(
            sum(c.values()) for name, c in counted.items() if name.endswith(theirs)
        )
    assert costs["lm_head"].flops == sum(counted["GPT.lm_head"].values())


@pytest.mark.parametrize(
    ("Tq", "Tk", "cache"),
    [(1, 1, False), (9, 9, False), (1, 1, True), (9, 9, True), (1, 9, True)],
)
@pytest.mark.parametrize("n_layer", [1, 3])
def test_launches_are_those_that_happen(Tq, Tk, cache, n_layer):
    config = GPTConfig(n_layer, 2, 16, 16, 7)
    launched = run(config, Tq, Tk, 1, cache, True, sdpa_attention, Launches()).names
    assert total(operator_costs(config, Tq, Tk, cache=cache)).ops == len(launched), launched


def constant_in_batch(config, Tq, Tk, dtype=torch.float32):
    """Bytes that do not grow with the batch; costs are linear in it."""
    one, two = (total(operator_costs(config, Tq, Tk, B, dtype)).bytes for B in (1, 2))
    return 2 * one - two


@settings(max_examples=30, deadline=None)
@given(steps(), st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_each_parameter_is_read_once(step, dtype):
    config, Tq, Tk, _ = step
    model = GPT(config).to(dtype)
    weights = (
        sum(p.nbytes for p in model.parameters()) - model.wpe.weight.nbytes
    )  # of the positions only Tq rows:
    positions = (
        3 * Tq * config.n_embd * dtype.itemsize + 2 * Tq * 8
    )  # read, written, read; their numbers written, read
    assert constant_in_batch(config, Tq, Tk, dtype) == weights + positions


@settings(max_examples=30, deadline=None)
@given(steps(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_cached_key_and_value_is_read_once(step, dtype):
    config, _, Tk, B = step
    read = [total(operator_costs(config, 1, T, B, dtype)).bytes for T in (1, Tk)]
    held = [kv_cache_bytes(config, B=B, max_len=T, dtype=dtype) for T in (1, Tk)]
    assert read[1] - read[0] == held[1] - held[0]


@settings(max_examples=30, deadline=None)
@given(steps())
def test_the_cache_is_written_once_for_each_new_token(step):
    config, Tq, Tk, B = step
    with_cache, without = (
        total(operator_costs(config, Tq, Tk, B, cache=c)) for c in (True, False)
    )
    held = kv_cache_bytes(config, B=B, max_len=Tq)
    assert with_cache.bytes - without.bytes == 2 * held  # read, and written
    assert with_cache.flops == without.flops


def test_grouped_queries_shrink_the_cache_that_is_read():
    def read(kv):
        config = replace(GPT2_SMALL, n_kv_head=kv)
        return decode_cost(config, 1024).bytes - decode_cost(config, 1).bytes

    assert read(12) == 3 * read(4) == 12 * read(1)


@pytest.mark.parametrize("config", [GPTConfig(), GPT2_SMALL])
def test_costs_grow_with_the_context_and_a_cache_pays(config):
    contexts = [1, 2, 16, 100, config.block_size]
    for cost in (prefill_cost, decode_cost, naive_cost):
        of = [cost(config, T) for T in contexts]
        assert all(
            a.bytes < b.bytes and a.flops < b.flops and a.ops == b.ops for a, b in pairwise(of)
        )
    for T in contexts[1:]:
        assert decode_cost(config, T).flops < naive_cost(config, T).flops / T * 1.5
        assert decode_cost(config, T).bytes < naive_cost(config, T).bytes


def test_a_batch_shares_the_weights():
    one, eight = decode_cost(GPT2_SMALL, 1), decode_cost(GPT2_SMALL, 1, B=8)
    assert eight.flops == 8 * one.flops
    assert one.bytes < eight.bytes < 1.1 * one.bytes
    assert eight.ops == one.ops
    assert eight.intensity > 7 * one.intensity


def test_the_head_may_work_for_the_last_position_alone():
    every, last = (
        operator_costs(GPTConfig(), 10, 10, B=2, last_only=last) for last in (False, True)
    )
    assert every["lm_head"].flops == 10 * last["lm_head"].flops
    assert {name for name in every if every[name] != last[name]} == {"lm_head", "layer_norm"}


def test_decoding_reads_about_the_parameters_and_does_two_flops_for_each():
    for config, n_params in ((GPT2_SMALL, 124_439_808), (GPT2_XL, 1_557_611_200)):
        read = decode_cost(config, 1, dtype=torch.bfloat16).bytes
        assert read == pytest.approx(2 * n_params, rel=0.005)
        assert decode_cost(config, 1).flops == pytest.approx(2 * n_params, rel=0.01)


def test_prefill_is_a_naive_step_that_keeps_its_keys():
    assert prefill_cost(GPTConfig(), 9).flops == naive_cost(GPTConfig(), 9).flops
    assert prefill_cost(GPTConfig(), 1) == decode_cost(GPTConfig(), 1)


def test_costs_add_up():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert sum([Cost(1, 2, 3)] * 3, Cost()) == Cost(3, 6, 9)


CONTEXT = "the context is {} tokens, but must be from 1 to block_size = 256."
QUERIES = "there are {} queries, but from 1 to the context's 5 are possible."


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: decode_cost(GPTConfig(), 0), CONTEXT.format(0)),
        (lambda: decode_cost(GPTConfig(), -5), CONTEXT.format(-5)),
        (lambda: naive_cost(GPTConfig(), 257), CONTEXT.format(257)),
        (lambda: operator_costs(GPTConfig(), 0, 5), QUERIES.format(0)),
        (lambda: operator_costs(GPTConfig(), 6, 5), QUERIES.format(6)),
        (lambda: prefill_cost(GPTConfig(), 5, B=0), "B is 0, but must be at least 1."),
    ],
)
def test_impossible_steps_are_refused(call, said):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == said
