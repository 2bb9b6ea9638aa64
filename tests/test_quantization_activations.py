"""Inputs in eight bits: with a scale for each token, or one that is fixed; smoothed or not."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gptlite.distillation.label_files import fingerprint
from gptlite.quantization.activations import RoundedInputLinear, input_peaks
from gptlite.quantization.fits import smooth
from gptlite.quantization.grids import INT8, round_to_nearest


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(K=32, N=8, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias).requires_grad_(False)


def prompt(B, T, seed=0):
    return torch.randint(17, (B, T), generator=torch.Generator().manual_seed(seed))


def off_by(layer, linear, x):
    """Each output's error in half steps of the input on every channel, times the weight."""
    weight = round_to_nearest(linear.weight, INT8).dequantize()
    exact = F.linear(x, weight, linear.bias)
    half = x.abs().amax(-1, keepdim=True) / 254
    return (layer(x) - exact).abs() / (half * weight.abs().sum(-1) + 1e-7)


@given(st.integers(1, 40), st.booleans(), st.sampled_from([1e-6, 1.0, 1e6]), st.integers(0, 99))
def test_with_a_scale_for_each_token_inputs_are_off_by_half_a_step(K, bias, size, seed):
    linear = make(K, bias=bias)
    layer, x = RoundedInputLinear(linear), size * random(2, 3, K, seed=seed)
    assert layer(x).shape == (2, 3, 8)
    assert (off_by(layer, linear, x) <= 1.01).all()


@torch.no_grad()
def test_each_token_has_a_scale_of_its_own():
    linear = make()
    layer, x = RoundedInputLinear(linear), random(3, 32)
    x[1] *= 1e4
    assert (off_by(layer, linear, x) <= 1.01).all()
    torch.testing.assert_close(
        layer(x), torch.stack([layer(row) for row in x]), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(layer(torch.zeros(2, 32)), linear.bias.expand(2, 8))


def test_weights_are_in_eight_bits_and_the_linear_stays_as_it_was():
    linear = make()
    before = linear.weight.clone()
    layer = RoundedInputLinear(linear)
    assert torch.equal(layer.weight, round_to_nearest(before, INT8).dequantize())
    assert torch.equal(linear.weight, before) and layer.bias is linear.bias


def test_a_fixed_scale_is_that_of_the_largest_peak():
    linear, x = make(), random(5, 32)
    layer = RoundedInputLinear(linear, x.abs().amax(0))
    step = x.abs().max() / 127
    rounded = (x / step).round() * step
    torch.testing.assert_close(
        layer(x), F.linear(rounded, layer.weight, linear.bias), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        layer(x / 1000), linear.bias.expand(5, 8), atol=1e-6, rtol=0
    )  # all rounded to zero


def test_a_fixed_scale_clips_what_lies_beyond():
    linear = make()
    layer = RoundedInputLinear(linear, torch.full((32,), 2.0))
    x = torch.full((1, 32), 2.0)
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight, linear.bias), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(layer(50 * x), layer(x))
    assert torch.equal(layer(-50 * x), layer(-x))
    assert not torch.allclose(RoundedInputLinear(linear)(50 * x), layer(x))


def test_smoothing_divides_the_input_and_multiplies_the_weight():
    linear, x = make(), random(5, 32)
    x[:, 3] *= 100
    peaks = x.abs().amax(0)
    layer, s = RoundedInputLinear(linear, peaks, power=0.5), smooth([linear.weight], peaks, 0.5)
    assert torch.equal(layer.weight, round_to_nearest(linear.weight * s, INT8).dequantize())
    assert torch.equal(layer.most, (peaks / s).max())
    step = (peaks / s).max() / 127
    expected = F.linear((x / s / step).round() * step, layer.weight, linear.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_smoothing_helps_where_one_channel_is_an_outlier():
    linear, x = make(128, 32), random(200, 128)
    x[:, 3] *= 100
    exact, peaks = linear(x), x.abs().amax(0)
    plain, smoothed = (RoundedInputLinear(linear, peaks, power)(x) for power in (None, 0.5))
    assert (smoothed - exact).norm() < 0.5 * (plain - exact).norm()


def test_a_fixed_scale_is_worse_than_one_for_each_token_where_tokens_differ():
    linear, x = make(128, 32), random(50, 128) * torch.logspace(-2, 1, 50)[:, None]
    exact = linear(x)
    static, dynamic = (
        RoundedInputLinear(linear, peaks)(x) for peaks in (x.abs().amax(0), None)
    )
    worst = [((y - exact).norm(dim=-1) / exact.norm(dim=-1)).max() for y in (static, dynamic)]
    assert worst[0] > 10 * worst[1]


def test_inputs_that_were_always_zero_stay_zero():
    """A layer whose calibration saw zeros alone must not divide by them."""
    linear = make()
    for power in (None, 0.5):
        y = RoundedInputLinear(linear, torch.zeros(32), power)(torch.zeros(2, 32))
        assert torch.equal(y, linear.bias.expand(2, 8))


def test_smoothing_without_peaks_and_with_other_powers_is_refused():
    with pytest.raises(
        ValueError,
        match=r"smoothing has to know the peaks of the input's channels; give them, too\.",
    ):
        RoundedInputLinear(make(), power=0.5)
    with pytest.raises(ValueError, match=r"power is 2, but must be from 0 to 1\."):
        RoundedInputLinear(make(), torch.ones(32), power=2)


PEAKS = [(None, None), (2 * torch.ones(32), None), (torch.arange(32) + 1.0, 0.5)]


@pytest.mark.parametrize(("peaks", "power"), PEAKS)
def test_all_that_it_computes_with_is_loaded_and_makes_the_fingerprint(peaks, power):
    one = RoundedInputLinear(make(), peaks, power)
    other = None if peaks is None else 3 * peaks.flip(0)
    two = RoundedInputLinear(nn.Linear(32, 8).requires_grad_(False), other, power)
    assert fingerprint(one) != fingerprint(two)
    two.load_state_dict(one.state_dict())
    x = random(5, 32)
    assert fingerprint(one) == fingerprint(two) and torch.equal(one(x), two(x))


@pytest.mark.parametrize(("peaks", "power"), PEAKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_follows_the_model_to_another_format(peaks, power, dtype):
    x = random(5, 32)
    expected = RoundedInputLinear(make(), peaks, power)(x)
    after = RoundedInputLinear(make(), peaks, power).to(dtype)(x.to(dtype))
    before = RoundedInputLinear(make().to(dtype), peaks, power)(x.to(dtype))
    for y in (after, before):
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        y = RoundedInputLinear(make(), peaks, power)(x)
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("peaks", "power"), PEAKS)
def test_it_is_made_where_its_weight_is(peaks, power):
    linear, x = make(), random(5, 32)
    expected = RoundedInputLinear(linear, peaks, power)(x)
    with torch.device("meta"):  # where all would land that is not said to be elsewhere
        assert torch.equal(RoundedInputLinear(linear, peaks, power)(x), expected)


@torch.no_grad()
def test_peaks_are_those_of_each_linear_while_the_model_reads(make_model):
    model, idx = make_model(), prompt(3, 20)
    peaks = input_peaks(model, idx)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert list(peaks) == linears and len(linears) == 2 * 4 + 1
    x = model.wte(idx) + model.wpe(torch.arange(20))
    for block in model.h:
        normed = block.ln_1(x)
        torch.testing.assert_close(peaks[block.attn.c_attn], normed.abs().amax((0, 1)))
        after = x + block.attn(normed)
        hidden = F.gelu(block.mlp.c_fc(block.ln_2(after)), approximate="tanh")
        torch.testing.assert_close(peaks[block.mlp.c_fc], block.ln_2(after).abs().amax((0, 1)))
        torch.testing.assert_close(peaks[block.mlp.c_proj], hidden.abs().amax((0, 1)))
        x = block(x)
    torch.testing.assert_close(peaks[model.lm_head], model.ln_f(x).abs().amax((0, 1)))


def test_peaks_leave_no_hook_behind(make_model):
    model = make_model()
    input_peaks(model, prompt(1, 4))
    with pytest.raises(ValueError, match="more than the model's block_size"):
        input_peaks(model, prompt(1, 25))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("static", "power"), [(False, None), (True, None), (True, 0.5)])
@torch.no_grad()
def test_a_model_of_rounded_inputs_says_nearly_the_same(make_model, static, power):
    model, idx = make_model(), prompt(2, 20)
    expected, peaks = model(idx), input_peaks(model, idx)
    model.swap_linears(lambda m: RoundedInputLinear(m, peaks[m] if static else None, power))
    off = (model(idx) - expected).norm() / expected.norm()
    assert 1e-5 < off < 0.1
