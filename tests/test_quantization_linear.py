"""The kernel computes rounded rows times dequantized weights; all else is dequantized."""

import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlite.kernels import load as cpp
from gptlite.quantization import linear as quantized_linear
from gptlite.quantization.files import linear_of_parts
from gptlite.quantization.grids import INT4, INT8, Grid, Quantized, from_codes, round_to_nearest
from gptlite.quantization.linear import (
    Int4Linear,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    load_kernel,
    pack,
    unpack,
)

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
KERNEL_GRIDS = [INT8, INT4, Grid(8, 64), Grid(4, 128), Grid(4, None), Grid(3, 64)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_codes(N, K, bits, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (N, K), generator=rng).to(
        torch.int8
    )


def make(K=64, N=33, grid=INT4, bias=True, dtype=torch.float32, **parts):
    """A Linear of codes on a grid, and the codes; no parameter needs a gradient."""
    torch.manual_seed(K + N)
    linear = nn.Linear(K, N, bias=bias).to(dtype).requires_grad_(False)
    q = round_to_nearest(linear.weight, grid)
    q = Quantized(q.codes, q.scale, q.bits, q.middle, **parts)
    return QuantizedLinear(linear, q), q


def rounded(x):
    """Rows (..., K) in eight bits, in blocks of 64, with halves rounded away from zero.

    And what may round either way: last bits of a product decide about a number within 1e-4 of a
    half, as 63.5 is where one is twice another.
    """
    blocks = x.float().unflatten(-1, (-1, 64))
    most = blocks.abs().amax(-1, keepdim=True)
    codes = blocks * torch.where(most > 0, 127 / most, 0)
    unsure = (codes.abs() % 1 - 0.5).abs() < 1e-4
    step = most.double() / 127
    return ((codes.sign() * (codes.abs() + 0.5).floor()) * step).flatten(-2), (
        unsure * step
    ).flatten(-2)


def assert_is_twin(y, x, q, bias):
    """Whether y (..., N) is the product, in float64, of rounded rows x (..., K) with codes."""
    (x, unsure), weight = rounded(x), from_codes(q.codes, q.scale, q.middle).double()
    exact = F.linear(x, weight, None if bias is None else bias.double())
    sizes = F.linear(x.abs(), weight.abs(), None if bias is None else bias.double().abs())
    eps = torch.finfo(y.dtype).eps if y.dtype == torch.bfloat16 else 0
    bound = 1e-5 * sizes + eps * exact.abs() + F.linear(unsure, weight.abs()) * (1 + eps)
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())


# codes in memory


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([1, 2, 31, 32, 33, 64, 65]),
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_what_is_packed_comes_back(bits, N, eights, seed):
    codes = random_codes(N, 8 * eights, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (-(-N // 32), 8 * eights * bits // 32, 128)
    assert torch.equal(unpack(packed, bits, torch.arange(N)), codes)


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([1, 33, 65]),
    st.sampled_from([(), (1,), (0,), (5,), (2, 3), (2, 1, 2)]),
)
def test_rows_are_unpacked_in_any_order_and_shape(bits, N, shape):
    codes = random_codes(N, 16, bits)
    idx = torch.randint(N, shape, generator=torch.Generator().manual_seed(1))
    rows = unpack(pack(codes, bits), bits, idx)
    assert rows.shape == (*shape, 16) and rows.dtype == torch.int8
    assert torch.equal(rows, codes[idx])


@pytest.mark.parametrize("bits", [4, 8])
def test_each_byte_lies_where_it_is_documented(bits):
    """128 bytes hold four codes of each of 32 rows, the next four in the upper halves."""
    codes = random_codes(33, 16, bits)
    packed, zero = pack(codes, bits), 2 ** (bits - 1)
    assert packed.shape == (2, 16 * bits // 32, 128)
    for n in range(64):
        row = codes[n].tolist() if n < 33 else [0] * 16  # filled up to whole 32
        for k in range(0, 16, 32 // bits):
            found = packed[n // 32, k * bits // 32, n % 32 * 4 : n % 32 * 4 + 4].tolist()
            low = [code + zero for code in row[k : k + 4]]
            high = [code + zero << 4 for code in row[k + 4 : k + 8]] if bits == 4 else [0] * 4
            assert found == [a | b for a, b in zip(low, high, strict=True)]


def test_a_tiny_example_by_hand():
    codes = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, 4]], dtype=torch.int8)
    assert pack(codes, 4)[0, 0, :5].tolist() == [
        0x90, 0xA1, 0xB8, 0xCF, 0x88,
    ]  # fmt: skip
    assert pack(torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8), 8)[0, 0, :5].tolist() == [
        0,
        127,
        128,
        255,
        128,
    ]


def test_rows_that_do_not_fill_vectors_are_refused():
    for bits, K, vector in ((4, 12, 8), (8, 6, 4)):
        with pytest.raises(
            ValueError,
            match=f"{K} codes of {bits} bits a row do not fill vectors of {vector}",
        ):
            pack(torch.zeros(4, K, dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 16])
def test_bits_in_which_nothing_is_packed_are_refused(bits):
    with pytest.raises(ValueError, match=rf"\b{bits}\b.*\b(4 or 8|8 or 4|four or eight)\b"):
        pack(torch.zeros(4, 64, dtype=torch.int8), bits)


# the kernel


@settings(max_examples=60)
@given(
    st.sampled_from(KERNEL_GRIDS), st.sampled_from([64, 128, 192, 384]),
    st.sampled_from([1, 31, 32, 33, 65, 100]), st.integers(1, 9), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
@torch.no_grad()
def test_the_kernel_is_rounded_rows_times_dequantized_weights(
    grid, K, N, rows, bias, dtype, seed
):
    group = None if K % (grid.group or K) else grid.group
    layer, q = make(K, N, Grid(grid.bits, group), bias, dtype)
    assert layer.has_kernel
    x = random(rows, K, seed=seed, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_is_twin(y, x, q, layer.bias)


@torch.no_grad()
def test_rounding_the_rows_changes_the_product_a_little_and_never_for_whole_numbers():
    layer, _ = make(128, 64, INT8)
    x = random(8, 128)
    exact = F.linear(x, layer.weight, layer.bias)
    assert 1e-4 < ((layer(x) - exact).norm() / exact.norm()).item() < 0.02
    whole = random_codes(8, 128, 8).clamp(-127).float()
    whole[:, ::64] = 127
    torch.testing.assert_close(
        layer(whole), F.linear(whole, layer.weight, layer.bias), atol=1e-3, rtol=1e-5
    )


@torch.no_grad()
def test_halves_are_rounded_away_from_zero():
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.copy_(torch.eye(64))
    x = torch.tensor(
        [127.0, 0.5, -0.5, 1.5, -1.5, 2.5, 0.49, -0.49, 63.5, -126.5, -127.0] + 53 * [0.0]
    )
    expected = torch.tensor([127.0, 1, -1, 2, -2, 3, 0, 0, 64, -127, -127] + 53 * [0])
    torch.testing.assert_close(
        Int8Linear(linear)(x) / Int8Linear(linear).weight.diagonal(), expected
    )


@torch.no_grad()
def test_each_block_of_64_has_a_scale_of_its_own():
    layer, _ = make(128, 40, INT8)
    x = random(2, 128)
    x[:, :64] *= 1e6
    both = layer(x) - layer.bias
    x[:, :64] = 0
    alone = layer(x) - layer.bias
    exact = F.linear(x, layer.weight)
    assert (alone - exact).norm() < 0.02 * exact.norm()
    assert both.norm() > 1e4 * alone.norm()


@pytest.mark.parametrize("grid", [INT8, INT4, Grid(4, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_rows_of_a_prompt_are_what_each_is_alone_bit_for_bit(grid, dtype):
    layer, _ = make(128, 97, grid, dtype=dtype)
    for rows in range(1, 10):
        x = random(rows, 128, seed=rows, dtype=dtype)
        assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


@pytest.mark.parametrize("rows", [127, 128, 129, 131, 260])
@torch.no_grad()
def test_the_rows_of_a_long_prompt_too(rows):
    layer, q = make(64, 65)
    x = random(rows, 64)
    y = layer(x)
    assert torch.equal(y, torch.cat([layer(row) for row in x.split(1)]))
    assert_is_twin(y, x, q, layer.bias)


@torch.no_grad()
def test_two_threads_give_the_same_bits():
    layer, _ = make(128, 300)
    x = random(9, 128)
    one = layer(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer(x), one)
    finally:
        torch.set_num_threads(1)


@torch.no_grad()
def test_rows_may_lie_anywhere_and_in_any_shape():
    layer, q = make(64, 33)
    x = random(2, 5, 64)
    y = layer(x)
    assert y.shape == (2, 5, 33)
    assert_is_twin(y, x, q, layer.bias)
    assert torch.equal(layer(x[1, 3]), y[1, 3])
    assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))
    wide = torch.zeros(2, 5, 128)
    wide[..., ::2] = x
    assert not wide[..., ::2].is_contiguous()
    assert torch.equal(layer(wide[..., ::2]), y)
    assert torch.equal(layer(x.mT.contiguous().mT), y)
    assert layer(x[:, :0]).shape == (2, 0, 33)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_zero_rows_give_the_bias(bias):
    layer, _ = make(64, 33, bias=bias)
    expected = layer.bias if bias else torch.zeros(33)
    assert torch.equal(layer(torch.zeros(3, 64)), expected.expand(3, 33))
    x = random(3, 64)
    x[1] = 0
    assert torch.equal(layer(x)[1], expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("grid", [INT8, INT4])
@torch.no_grad()
def test_a_row_with_a_number_that_is_none_is_nan_and_no_other_is(poison, grid):
    layer, _ = make(192, 33, grid)
    x = random(6, 192)
    clean = layer(x)
    x[4, 100] = poison
    found = layer(x)
    assert found[4].isnan().all()
    others = [0, 1, 2, 3, 5]
    assert torch.equal(found[others], clean[others])


@torch.no_grad()
def test_rows_of_very_large_and_very_small_numbers():
    layer, q = make(64, 33, bias=False)
    for size in (1e-30, 1e30):
        x = size * random(3, 64)
        torch.testing.assert_close(layer(x) / size, layer(x / size), atol=1e-3, rtol=1e-3)
        assert_is_twin(layer(x), x, q, None)


@torch.no_grad()
def test_weights_of_very_large_and_very_small_numbers():
    for size in (1e-30, 1e30):
        linear = nn.Linear(64, 33, bias=False)
        linear.weight.mul_(size)
        x = random(3, 64)
        assert_is_twin(Int8Linear(linear)(x), x, round_to_nearest(linear.weight, INT8), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_input_scale_multiplies_the_rows(dtype):
    s = torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.5
    layer, q = make(64, 33, dtype=dtype, input_scale=s)
    x = random(3, 64, dtype=dtype)
    plain = from_codes(q.codes, q.scale)
    assert_is_twin(layer(x), x * s.to(dtype), q, layer.bias)
    torch.testing.assert_close(layer.weight, plain * s)
    assert (layer(x) - F.linear(x, plain.to(dtype), layer.bias)).abs().max() > 0.01


@pytest.mark.parametrize("grid", [INT8, INT4])
@torch.no_grad()
def test_codes_and_scales_may_begin_at_any_byte(grid):
    layer, _ = make(64, 33, grid)
    x = random(5, 64)
    codes = (
        torch.empty(layer.codes.numel() + 1, dtype=torch.uint8)[1:]
        .view(layer.codes.shape)
        .copy_(layer.codes)
    )
    scale = (
        torch.empty(layer.scale.numel() + 1, dtype=torch.bfloat16)[1:]
        .view(layer.scale.shape)
        .copy_(layer.scale)
    )
    assert codes.data_ptr() % 2 == 1 and scale.data_ptr() % 4 == 2
    load_kernel()
    assert torch.equal(
        torch.ops.gptlite.quantized_linear(x, codes, scale, layer.bias, 33), layer(x)
    )


@torch.no_grad()
def test_codes_scales_and_bias_may_be_strided():
    layer, _ = make(128, 33, INT8)
    x = random(2, 128)
    codes, scale, bias = (
        torch.stack([t, t + t], -1)[..., 0] for t in (layer.codes, layer.scale, layer.bias)
    )
    assert not (codes.is_contiguous() or scale.is_contiguous() or bias.is_contiguous())
    assert torch.equal(torch.ops.gptlite.quantized_linear(x, codes, scale, bias, 33), layer(x))


CODES, SCALE = ((1, 16, 128), torch.uint8), ((1, 1, 32), torch.bfloat16)
ROWS = ((1, 64), torch.float32)


@pytest.mark.parametrize(
    ("x", "codes", "scale", "bias", "N", "error", "message"),
    [
        (((1, 65), torch.float32), CODES, SCALE, None, 32, ValueError,
         "the rows are [1, 65], but must end in a multiple of 64 columns."),
        (((), torch.float32), CODES, SCALE, None, 32, ValueError,
         "the rows are [], but must end in a multiple of 64 columns."),
        (((1, 0), torch.float32), CODES, SCALE, None, 32, ValueError,
         "the rows are [1, 0], but must end in a multiple of 64 columns."),
        (((1, 192), torch.float32), CODES, SCALE, None, 32, ValueError,
         "the codes are [1, 16, 128], but for 32 rows of 192 must be packed with 8 or 4 bits."),
        (ROWS, ((16, 128), torch.uint8), SCALE, None, 32, ValueError,
         "the codes are [16, 128], but for 32 rows of 64 must be packed with 8 or 4 bits."),
        (ROWS, CODES, SCALE, None, 33, ValueError,
         "the codes are [1, 16, 128], but for 33 rows of 64 must be packed with 8 or 4 bits."),
        (ROWS, ((1, 16, 64), torch.uint8), SCALE, None, 32, ValueError,
         "the codes are [1, 16, 64], but for 32 rows of 64 must be packed with 8 or 4 bits."),
        (ROWS, CODES, ((1, 32), torch.bfloat16), None, 32, ValueError,
         "the scales are [1, 32], but must be (1, groups, 32)"),
        (ROWS, CODES, ((1, 2, 32), torch.bfloat16), None, 32, ValueError,
         "the scales are [1, 2, 32], but must be (1, groups, 32)"),
        (ROWS, CODES, ((1, 0, 32), torch.bfloat16), None, 32, ValueError,
         "the scales are [1, 0, 32], but must be (1, groups, 32)"),
        (
            ROWS, CODES, SCALE, ((31,), torch.float32), 32,
            ValueError, "the bias has 31 numbers, but must have 32.",
        ),
        (ROWS, ((1, 16, 128), torch.int8), SCALE, None, 32, TypeError,
         "codes and scales are Char and BFloat16, but must be Byte and BFloat16."),
        (ROWS, CODES, ((1, 1, 32), torch.float32), None, 32, TypeError,
         "codes and scales are Byte and Float, but must be Byte and BFloat16."),
        (ROWS, CODES, SCALE, ((32,), torch.bfloat16), 32, TypeError,
         "the rows are Float, but the bias is BFloat16; both must be alike."),
    ],
)  # fmt: skip
def test_the_kernel_refuses_what_does_not_fit(x, codes, scale, bias, N, error, message):
    load_kernel()
    tensors = [
        None if t is None else torch.ones(t[0], dtype=t[1]) for t in (x, codes, scale, bias)
    ]
    with pytest.raises(error) as caught:
        torch.ops.gptlite.quantized_linear(*tensors, N)
    said = str(caught.value).splitlines()[0]
    assert said.startswith(message) and said.endswith(".")


def test_the_kernel_says_what_it_is_to_those_who_trace_it():
    layer, _ = make(64, 33)
    for x in (random(3, 64), random(2, 3, 64)):
        args = (x, layer.codes, layer.scale, layer.bias, 33)
        torch.library.opcheck(
            torch.ops.gptlite.quantized_linear.default,
            args,
            test_utils=("test_schema", "test_faketensor"),
        )


# all else


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, 32),
        Grid(8, 16),
        Grid(4, 64, symmetric=False),
        Grid(8, None, symmetric=False),
        Grid(2, 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_grids_are_dequantized(grid, dtype):
    layer, q = make(128, 33, grid, dtype=dtype)
    x = random(2, 3, 128, dtype=dtype)
    assert not layer.has_kernel
    assert torch.equal(layer.weight, q.dequantize())
    assert torch.equal(layer(x), F.linear(x, q.dequantize().to(dtype), layer.bias))


@torch.no_grad()
def test_rows_of_other_lengths_are_dequantized():
    layer, q = make(40, 7, INT8)
    assert not layer.has_kernel
    x = random(3, 40)
    assert torch.equal(layer(x), F.linear(x, q.dequantize(), layer.bias))


@pytest.mark.parametrize("grid", [INT8, INT4])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_for_x_is_that_of_the_dequantized_weight(grid, scaled):
    s = {"input_scale": torch.rand(64) + 0.5} if scaled else {}
    layer, q = make(64, 33, grid, **s)
    x, g = random(3, 64).requires_grad_(), random(3, 33, seed=1)
    y = layer(x)
    assert torch.equal(y, F.linear(x, q.dequantize(), layer.bias))
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ q.dequantize(), **CLOSE)
    with torch.no_grad():  # the kernel again
        assert_is_twin(layer(x), x * s.get("input_scale", 1), q, layer.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_formats_that_the_kernel_does_not_read_are_dequantized(dtype):
    layer, q = make(64, 33, dtype=dtype)
    x = random(3, 64, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y, F.linear(x, q.dequantize().to(dtype), layer.bias), atol=2e-3, rtol=2e-3
    )


@torch.no_grad()
def test_without_a_kernel_all_is_dequantized(monkeypatch):
    monkeypatch.setattr(quantized_linear, "load_kernel", lambda: False)
    layer, q = make(64, 33)
    x = random(3, 64)
    assert not layer.has_kernel
    assert torch.equal(layer(x), F.linear(x, q.dequantize(), layer.bias))


def test_a_kernel_that_cannot_be_built_is_a_warning(monkeypatch):
    def load_cpp(*names):
        raise OSError("install a C++ compiler.")

    monkeypatch.setattr(cpp, "load_cpp", load_cpp)
    with pytest.warns(
        UserWarning,
        match=re.escape("Codes will be dequantized at each product: install a C++ compiler."),
    ):
        assert load_kernel.__wrapped__() is False


@pytest.mark.parametrize("grid", [INT8, INT4, Grid(4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_a_run_in_bfloat16_rows_of_either_format_are_taken(grid, dtype):
    """A layer's bias stays in float32 while autocast hands it rows of both formats."""
    layer, q = make(64, 33, grid)
    x = random(3, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = F.linear(x.float(), q.dequantize(), layer.bias)
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


# the module


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_it_is_traced_as_one_call_of_the_kernel(backend):
    layer, _ = make(64, 33)
    x = random(3, 64)
    torch._dynamo.reset()
    step = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
    assert torch.equal(step(x), layer(x))
    graphs = []
    torch._dynamo.reset()
    torch.compile(
        layer, fullgraph=True, dynamic=False, backend=lambda g, _: graphs.append(g) or g.forward
    )(x)
    [graph] = graphs
    assert (
        sum(
            "quantized_linear" in str(node.target)
            for node in graph.graph.nodes
            if node.op == "call_function"
        )
        == 1
    )


@torch.no_grad()
def test_codes_that_are_dequantized_are_traced_too():
    layer, _ = make(64, 33, Grid(4, 32, symmetric=False))
    x = random(3, 64)
    torch._dynamo.reset()
    step = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(step(x), layer(x), **CLOSE)


def test_the_two_kinds_are_of_their_grids():
    linear = nn.Linear(128, 64)
    eight, four = Int8Linear(linear), Int4Linear(linear)
    assert (eight.bits, four.bits) == (8, 4)
    assert torch.equal(
        eight.weight, round_to_nearest(linear.weight.detach(), INT8).dequantize()
    )
    assert torch.equal(four.weight, round_to_nearest(linear.weight.detach(), INT4).dequantize())
    assert eight.nbytes == 64 * 128 + 64 * 2 + 64 * 4
    assert four.nbytes == 64 * 128 // 2 + 64 * 2 * 2 + 64 * 4
    assert 8 * (four.nbytes - 64 * 4) == INT4.bits_per_weight(128) * 64 * 128


def test_few_bits_are_stored_in_four_and_many_in_eight():
    for bits in range(2, 9):
        layer, q = make(64, 32, Grid(bits, 64), bias=False)
        assert layer.bits == (4 if bits <= 4 else 8)
        assert torch.equal(layer.weight, q.dequantize())


@given(
    st.sampled_from(KERNEL_GRIDS[:4]),
    st.sampled_from([(), (0,), (4,), (2, 3)]),
    st.booleans(),
    st.booleans(),
)
def test_rows_of_the_weight(grid, shape, symmetric, scaled):
    grid = Grid(grid.bits, grid.group, symmetric)
    layer, q = make(128, 65, grid, **({"input_scale": torch.rand(128)} if scaled else {}))
    idx = torch.randint(65, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.rows(idx), q.dequantize()[idx])


def test_formats_change_the_rest_and_leave_the_scales():
    layer, _ = make(64, 33, Grid(4, 64, symmetric=False), input_scale=torch.ones(64))
    codes, scale, middle = layer.codes, layer.scale.clone(), layer.middle.clone()
    for to, dtype in (
        (torch.bfloat16,) * 2,
        (torch.float32,) * 2,
        (torch.float16,) * 2,
        (torch.float64,) * 2,
    ):
        layer.to(to)
        assert layer.scale.dtype == layer.middle.dtype == torch.bfloat16
        assert layer.bias.dtype == layer.input_scale.dtype == dtype
        assert torch.equal(layer.codes, codes)
        assert torch.equal(layer.scale, scale) and torch.equal(layer.middle, middle)
    assert layer.half().scale.dtype == layer.float().scale.dtype == torch.bfloat16
    assert {name for name, _ in layer.named_buffers()} == {
        "codes",
        "scale",
        "middle",
        "input_scale",
    }


@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e6])
def test_scales_are_kept_where_float16_has_no_such_number(size):
    linear = nn.Linear(64, 33)
    linear.weight.data.mul_(size)
    layer = Int8Linear(linear)
    before = layer.scale.clone()
    assert torch.equal(layer.half().scale, before)


def test_its_tensors_are_the_codes_and_the_bias_of_the_linear():
    linear = nn.Linear(64, 33)
    layer = Int4Linear(linear)
    assert layer.bias is linear.bias
    assert set(layer.state_dict()) == {"codes", "scale", "bias"}
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    twin = linear_of_parts(linear, layer.codes, layer.scale, None, None)
    with torch.no_grad():
        assert torch.equal(twin(random(3, 64)), layer(random(3, 64)))
        assert torch.equal(copy.deepcopy(layer)(random(3, 64)), layer(random(3, 64)))


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        ((2, 7, 128), (2, 1, 32)), ((1, 8, 128), (2, 1, 32)),
        ((2, 8, 64), (2, 1, 32)), ((2, 8, 128), (1, 1, 32)),
        ((2, 8, 128), (2, 1, 31)), ((2, 24, 128), (2, 1, 32)), ((2, 0, 128), (2, 1, 32)),
        ((2, 8, 128), (2, 3, 32)), ((2, 8, 128), (2, 0, 32)), ((2, 8, 128), (2, 32)),
        ((16,), (2, 1, 32)),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(codes, scale):
    message = f"codes {codes} and scales {scale} are not those of 33 rows of 64 weights in four"
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_of_parts(
            nn.Linear(64, 33),
            torch.zeros(codes, dtype=torch.uint8),
            torch.zeros(scale).bfloat16(),
            None,
            None,
        )


def test_parts_make_the_same_bits_again():
    """Codes and scales of rows that fill no whole 32, with a middle and an input scale."""
    for bits in (3, 4, 8):
        layer, _ = make(64, 33, Grid(bits, 32, symmetric=False), input_scale=torch.rand(64))
        parts = layer.codes, layer.scale, layer.middle, layer.input_scale
        twin = linear_of_parts(nn.Linear(64, 33), *parts)
        for mine, theirs in zip(layer.buffers(), twin.buffers(), strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
        assert twin.bits == layer.bits and twin.has_kernel == layer.has_kernel


# the embedding


class Tied(nn.Module):
    """A head and the embedding that is tied to it, as in a model."""

    def __init__(self, dtype=torch.float32, **parts):
        super().__init__()
        self.head, _ = make(64, 65, bias=False, **parts)
        self.wte = QuantizedEmbedding(self.head, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_is_rows_of_the_head(dtype):
    model, idx = Tied(dtype), torch.randint(65, (2, 5))
    assert model.wte(idx).dtype == dtype
    assert torch.equal(model.wte(idx), model.head.weight[idx].to(dtype))


def test_an_embedding_follows_the_model_and_is_saved_once():
    model, idx = Tied(), torch.randint(65, (2, 5))
    assert set(model.state_dict()) == {"head.codes", "head.scale"}
    assert (
        len(list(model.buffers())) == 3
        and sum(b.nbytes for b in model.buffers()) == model.head.nbytes
    )
    assert model.to(torch.bfloat16).wte(idx).dtype == torch.bfloat16
    assert torch.equal(model.wte(idx), model.head.weight[idx].bfloat16())
    assert model.float().wte(idx).dtype == torch.float32


def test_a_copy_of_the_model_has_an_embedding_of_its_own_head():
    model, idx = Tied(), torch.arange(65)
    twin, before = copy.deepcopy(model), model.wte(torch.arange(65))
    twin.head.codes.zero_()
    assert torch.equal(model.wte(idx), before)
    assert torch.equal(twin.wte(idx), twin.head.weight) and not torch.equal(
        twin.wte(idx), before
    )


@pytest.mark.parametrize("token", [-1, 65, 70, 95, 96])
def test_tokens_that_the_vocabulary_lacks_are_refused(token):
    """As those of an nn.Embedding: the rows that fill up a whole 32 are no tokens."""
    model = Tied()
    with pytest.raises(IndexError):
        model.wte(torch.tensor([token]))


def test_lookups_compute_the_rows_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(
        quantized_linear,
        "unpack",
        lambda p, b, rows: seen.append(rows.numel()) or unpack(p, b, rows),
    )
    Tied().wte(torch.tensor([3, 5]))
    assert seen == [2]
