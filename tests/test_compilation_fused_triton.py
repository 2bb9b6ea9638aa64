"""The fused kernels compute what their eager twins do, on a GPU or interpreted."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no Triton for this system")

from gptlite.compilation.fused_triton import (
    add_layer_norm,
    add_layer_norm_eager,
    bias_gelu,
    bias_gelu_eager,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATOL = {
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}  # of numbers up to about 4
LEADING = st.lists(st.integers(1, 3), max_size=3)  # none: the tensor is one row
DTYPES = st.sampled_from(list(ATOL))
LAYOUTS = st.sampled_from(["contiguous", "transposed", "every second"])


def random(*shape, seed=0, dtype=torch.float32, layout="contiguous", scale=1.0, offset=0.0):
    """Normal numbers: contiguous, stored the other way round, or every second column."""
    stored = {
        "contiguous": shape,
        "transposed": shape[::-1],
        "every second": (*shape[:-1], 2 * shape[-1]),
    }[layout]
    t = torch.randn(stored, generator=torch.Generator().manual_seed(seed)) * scale + offset
    t = t.to(DEVICE, dtype)
    return {
        "contiguous": t,
        "transposed": t.permute(*reversed(range(t.ndim))),
        "every second": t[..., ::2],
    }[layout]


def inputs(leading, C, **options):
    """x, residual, weight and bias; scale and offset are those of x and the residual."""
    shape = (*leading, C)
    x, residual = random(*shape, seed=1, **options), random(*shape, seed=2, **options)
    options = {k: v for k, v in options.items() if k not in ("scale", "offset")}
    return x, residual, random(C, seed=3, **options), random(C, seed=4, **options)


def step(dtype):
    """The distance from 1 to the next number: as much as the interpreter's cutting errs."""
    return torch.finfo(dtype).eps


def layer_norm_is_right(added, normed, weight, bias, eps=1e-5):
    """Against float64, from the stored sum: within the rounding of result and mean."""
    added, weight, bias = added.double(), weight.double(), bias.double()
    exact = F.layer_norm(added, weight.shape, weight, bias, eps)
    deviation = (added.var(-1, correction=0, keepdim=True) + eps).sqrt()
    far = 1e-5 + 1e-6 * added.abs().amax(-1, keepdim=True) / deviation
    bound = (
        step(normed.dtype) * exact.abs() + far * (1 + far) * weight.abs() + 1e-5 * bias.abs()
    )
    return bool(((normed.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("rows", "C"), [(3, 33), (1, 1), (2, 700)])
def test_nothing_is_written_beside_the_results(monkeypatch, rows, C):
    """Each result lies in a larger tensor, whose other numbers stay; else Python may end."""
    x, residual, weight, bias = inputs((rows,), C)
    around = 2048  # more than a program handles
    stores = []

    def in_the_middle(like):
        stores.append(torch.full((like.numel() + 2 * around,), 7.0, device=DEVICE))
        return stores[-1][around:-around].view(like.shape)

    monkeypatch.setattr(torch, "empty_like", in_the_middle)
    add_layer_norm(x, residual, weight, bias)
    bias_gelu(x, bias)
    assert len(stores) == 3
    for store in stores:
        assert bool((store[:around] == 7).all() and (store[-around:] == 7).all())
        assert not bool((store[around:-around] == 7).any())


@given(LEADING, st.integers(8, 200), DTYPES, LAYOUTS)
def test_the_fused_layer_norm_is_its_twin(leading, C, dtype, layout):
    tensors = inputs(leading, C, dtype=dtype, layout=layout)
    before = [t.clone() for t in tensors]
    results, expected = add_layer_norm(*tensors), add_layer_norm_eager(*tensors)
    for result, twin in zip(results, expected, strict=True):
        torch.testing.assert_close(result, twin, atol=ATOL[dtype], rtol=ATOL[dtype])
    assert all(map(torch.equal, tensors, before))


@given(LEADING, st.integers(1, 1500), DTYPES, LAYOUTS)
def test_the_fused_gelu_is_its_twin(leading, C, dtype, layout):
    x, _, _, bias = inputs(leading, C, dtype=dtype, layout=layout)
    before = x.clone(), bias.clone()
    torch.testing.assert_close(
        bias_gelu(x, bias), bias_gelu_eager(x, bias), atol=ATOL[dtype], rtol=ATOL[dtype]
    )
    assert torch.equal(x, before[0]) and torch.equal(bias, before[1])


@given(
    LEADING, st.sampled_from([1, 2, 3, 48, 64, 65]), DTYPES,
    st.sampled_from([0.0, 1e-3, 1.0, 100.0]), st.sampled_from([0.0, 10.0, -1e4]),
)  # fmt: skip
def test_layer_norm_keeps_its_precision_far_from_zero(leading, C, dtype, scale, offset):
    """Where the squares' mean less the mean's square would keep no digit of the variance."""
    x, residual, weight, bias = inputs(leading, C, dtype=dtype, scale=scale, offset=offset)
    added, normed = add_layer_norm(x, residual, weight, bias)
    exact = x.double() + residual.double()
    assert bool(((added.double() - exact).abs() <= step(dtype) * exact.abs()).all())
    if (
        dtype != torch.bfloat16 or DEVICE == "cuda"
    ):  # the interpreter cuts a number to bfloat16, a GPU rounds it
        assert torch.equal(added, residual + x)
    assert layer_norm_is_right(added, normed, weight, bias)


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # the interpreter's NumPy: 1 / (1 + exp(100)) is 0
@given(
    LEADING, st.integers(1, 300), DTYPES,
    st.sampled_from([0.0, 1e-3, 1.0, 30.0]), st.sampled_from([0.0, 5.0, -100.0]),
)  # fmt: skip
def test_gelu_keeps_its_precision_far_from_zero(leading, C, dtype, scale, offset):
    """Against float64: x + bias is rounded to float32, and only the result to the format."""
    x, _, _, bias = inputs(leading, C, dtype=dtype, scale=scale, offset=offset)
    z = x.double() + bias.double()
    exact = F.gelu(z, approximate="tanh")
    bound = step(dtype) * exact.abs() + 1e-6 * (1 + z.abs())
    assert bool(((bias_gelu(x, bias).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", ATOL)
def test_zeros_give_the_bias(dtype):
    zeros, weight, bias = (
        torch.zeros(2, 3, 5, device=DEVICE, dtype=dtype),
        *inputs((), 5, dtype=dtype)[2:],
    )
    added, normed = add_layer_norm(zeros, zeros, weight, bias)
    assert torch.equal(added, zeros)
    assert torch.equal(normed, bias.expand(2, 3, 5))
    assert torch.equal(bias_gelu(zeros, torch.zeros_like(bias)), zeros)


def test_the_epsilon_is_under_the_root():
    x, residual, weight, bias = inputs((4,), 50, scale=1e-3)
    for eps in (1e-5, 1e-2):
        added, normed = add_layer_norm(x, residual, weight, bias, eps)
        assert layer_norm_is_right(added, normed, weight, bias, eps)


def test_no_rows_give_no_rows():
    x, residual, weight, bias = inputs((2, 0), 6)
    assert [t.shape for t in add_layer_norm(x, residual, weight, bias)] == [x.shape, x.shape]
    assert bias_gelu(x, bias).shape == x.shape


def ones(*shape, dtype=torch.float32, device=DEVICE):
    return torch.ones(shape, dtype=dtype, device=device)


def fitting(dtype=torch.float32, **others):
    """Tensors for `add_layer_norm` that fit together, but for `others`."""
    x, weight = ones(2, 4, dtype=dtype), ones(4, dtype=dtype)
    return {"x": x, "residual": x, "weight": weight, "bias": weight} | others


HALF, META = ones(4, dtype=torch.float16), ones(2, 4, device="meta")
COLUMNS = "but must have at least one column."
FORMATS = "but must be torch.float32, torch.bfloat16 or torch.float16."
X = f"but x is torch.float32 on {HALF.device}."


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (fitting(x=ones()), ValueError, f"x has the shape (), {COLUMNS}"),
        (fitting(x=ones(2, 0)), ValueError, f"x has the shape (2, 0), {COLUMNS}"),
        (
            fitting(residual=ones(4)),
            ValueError,
            "residual has the shape (4,), but must have (2, 4).",
        ),
        (
            fitting(residual=ones(4, 2)),
            ValueError,
            "residual has the shape (4, 2), but must have (2, 4).",
        ),
        (
            fitting(weight=ones(2, 4)),
            ValueError,
            "weight has the shape (2, 4), but must have (4,).",
        ),
        (fitting(bias=ones(1)), ValueError, "bias has the shape (1,), but must have (4,)."),
        (fitting(bias=HALF), TypeError, f"bias is torch.float16 on {HALF.device}, {X}"),
        (fitting(residual=META), TypeError, f"residual is torch.float32 on meta, {X}"),
        (fitting(torch.int64), TypeError, f"x is torch.int64, {FORMATS}"),
        (fitting(torch.float64), TypeError, f"x is torch.float64, {FORMATS}"),
        (
            fitting(weight=ones(4).requires_grad_()),
            RuntimeError,
            "the kernels have no backward pass; call them under torch.no_grad().",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        add_layer_norm(**tensors)


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (ones(2, 4), ones(2, 4), ValueError, "bias has the shape (2, 4), but must have (4,)."),
        (ones(2, 4), HALF, TypeError, f"bias is torch.float16 on {HALF.device}, {X}"),
        (ones(2, 4).long(), ones(4).long(), TypeError, f"x is torch.int64, {FORMATS}"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(x, bias, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        bias_gelu(x, bias)


def test_parameters_are_taken_without_gradients():
    x, residual, weight, bias = inputs((2,), 4)
    with torch.no_grad():
        results = add_layer_norm(x, residual, weight.requires_grad_(), bias.requires_grad_())
    assert not any(t.requires_grad for t in results)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "gptlite.compilation.fused_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    sentence = "the fused kernels are written in Triton; install it with pip install triton."
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(sentence)}$"):
        importlib.import_module("gptlite.compilation.fused_triton")


ON_A_CPU = """
import os, sys, torch
for interpret in "01":
    os.environ["TRITON_INTERPRET"] = interpret
    sys.modules.pop("gptlite.compilation.fused_triton", None)
    from gptlite.compilation.fused_triton import bias_gelu
    try:
        bias_gelu(torch.ones(1, 4), torch.ones(4))
    except RuntimeError as error:
        print(error)
"""


def test_on_a_cpu_the_interpreter_has_to_be_asked_for_in_time():
    """Not asked for, and asked for when Triton is there already."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", ON_A_CPU], cwd=root, capture_output=True, text=True
    )
    remedy = "set TRITON_INTERPRET=1 before anything imports Triton, as torch.compile does"
    sentence = f"on a CPU, {remedy}."
    assert done.stdout.splitlines() == [sentence] * 2, done.stderr
