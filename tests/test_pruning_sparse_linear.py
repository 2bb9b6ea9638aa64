"""Weights without their zeros: the dense products, and bytes as derived, for any shape."""

import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sums import new_model

from gptlite.distillation.label_files import fingerprint
from gptlite.kernels import load as cpp
from gptlite.pruning.sparse_linear import WORD, BitmapLinear, CsrLinear, load_kernel


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(K=70, N=9, density=0.5, bias=True, seed=0):
    """A Linear with some weights zero, which needs no gradient."""
    torch.manual_seed(seed)
    linear = nn.Linear(K, N, bias=bias).requires_grad_(False)
    linear.weight *= torch.rand(N, K) < density
    return linear


@given(st.integers(1, 6), st.integers(1, 8), st.floats(0, 1), st.booleans(), st.integers(0, 50))
def test_compressed_rows_compute_the_same(N, K, density, bias, seed):
    linear, x = make(K, N, density, bias, seed), random(2, 3, K, seed=seed)
    sparse = CsrLinear(linear)
    torch.testing.assert_close(sparse(x), linear(x), atol=1e-5, rtol=1e-5)
    assert sparse.nbytes == 8 * int((linear.weight != 0).sum()) + 4 * (N + 1)


@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.floats(0, 1),
    st.booleans(),
    st.integers(1, 9),
    st.integers(0, 50),
)
def test_a_bitmap_computes_the_same(N, K, density, bias, rows, seed):
    linear, x = make(K, N, density, bias, seed), random(rows, K, seed=seed)
    sparse = BitmapLinear(linear)
    assert sparse.has_kernel and torch.equal(sparse.weight, linear.weight)
    torch.testing.assert_close(sparse(x), linear(x), atol=1e-5, rtol=1e-5)
    assert sparse.nbytes == 4 * int((linear.weight != 0).sum()) + 8 * N * -(-K // WORD) + 8 * (
        N + 1
    )


def test_every_place_of_a_word_is_read():
    weight = torch.zeros(2 * WORD, 2 * WORD).fill_diagonal_(3.0)
    linear = nn.Linear(2 * WORD, 2 * WORD, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    x = random(1, 2 * WORD)
    assert torch.equal(BitmapLinear(linear)(x), 3 * x)


def test_rows_are_not_mixed_up():
    linear, x = make(), random(8, 70)
    sparse = BitmapLinear(linear)
    one_by_one = torch.cat([sparse(row[None]) for row in x])
    torch.testing.assert_close(sparse(x), one_by_one)
    assert sparse(x.view(2, 4, 70)).shape == (2, 4, 9) and sparse(x[0]).shape == (9,)
    torch.testing.assert_close(sparse(x.T.contiguous().T), sparse(x))


def test_what_the_kernel_does_not_read_is_made_dense(monkeypatch):
    linear = make()
    sparse = BitmapLinear(linear)
    monkeypatch.setattr(torch.ops.gptlite, "bitmap_linear", None)
    x = random(sparse.few + 1, 70)
    assert torch.equal(sparse(x), linear(x))
    half, narrow = BitmapLinear(make().bfloat16()), x[:1].bfloat16()
    assert torch.equal(half(narrow), make().bfloat16()(narrow))
    x = x[:1].clone().requires_grad_(True)
    sparse(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0, keepdim=True))
    sparse.has_kernel = False
    assert torch.equal(sparse(x), linear(x))


@pytest.mark.parametrize("kind", [CsrLinear, BitmapLinear])
def test_its_numbers_are_loaded_and_make_the_fingerprint(kind):
    """As many zeros, elsewhere and of other numbers: all is in the state."""
    linear, other = make(), make()
    other.weight.copy_(2 * linear.weight.roll(1, 0))
    one, two = kind(linear), kind(other)
    assert fingerprint(one) != fingerprint(two)
    two.load_state_dict(one.state_dict())
    x = random(3, 70)
    assert fingerprint(one) == fingerprint(two) and torch.equal(one(x), two(x))


@pytest.mark.parametrize("kind", [CsrLinear, BitmapLinear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_follows_the_model_to_another_format(kind, dtype):
    linear, x = make(), random(2, 3, 70)
    expected = linear(x)
    y = kind(linear).to(dtype)(x.to(dtype))
    assert y.dtype == dtype and y.shape == (2, 3, 9)
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", [CsrLinear, BitmapLinear])
def test_it_computes_in_a_run_in_bfloat16(kind):
    linear, x = make(), random(2, 3, 70)
    sparse = kind(linear)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for y in (sparse(x), sparse(x.bfloat16())):
            torch.testing.assert_close(y.float(), linear(x).float(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("kind", [CsrLinear, BitmapLinear])
def test_it_is_made_where_its_weight_is(kind):
    linear, x = make(), random(3, 70)
    with torch.device("meta"):  # where all would land that is not said to be elsewhere
        sparse = kind(linear)
        assert {t.device.type for t in sparse.state_dict().values()} == {"cpu"}
        torch.testing.assert_close(sparse(x), linear(x))
        assert sparse.weight.device.type == "cpu"


def test_a_whole_model():
    model = new_model().requires_grad_(False).eval()
    idx = torch.arange(8)[None] % 5
    expected = model(idx)
    torch.testing.assert_close(
        model.swap_linears(BitmapLinear)(idx), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiler_keeps_it_whole(backend):
    sparse, x = BitmapLinear(make()), random(1, 70)
    with torch.no_grad():
        compiled = torch.compile(sparse, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), sparse(x))


def test_a_kernel_that_cannot_be_built_is_a_warning(monkeypatch):
    def load_cpp(*names):
        raise OSError("install a C++ compiler.")

    monkeypatch.setattr(cpp, "load_cpp", load_cpp)
    with pytest.warns(
        UserWarning, match=re.escape("made dense at each product: install a C++ compiler.")
    ):
        assert load_kernel.__wrapped__() is False


def test_parts_that_do_not_fit():
    sparse = BitmapLinear(make())
    parts = {
        "x": random(1, 70),
        "numbers": sparse.numbers,
        "bits": sparse.bits,
        "starts": sparse.starts,
        "bias": None,
    }

    def call(**wrong):
        return torch.ops.gptlite.bitmap_linear(*(parts | wrong).values())

    torch.testing.assert_close(call() + sparse.bias, sparse(parts["x"]))
    for wrong, error, sentence in (
        (
            {"x": random(1, 200)},
            ValueError,
            r"the bits are \[9, 2\], but the rows are \[1, 200\]",
        ),
        (
            {"numbers": sparse.numbers[1:]},
            ValueError,
            r"there are \d+ numbers, but the rows end at",
        ),
        (
            {"starts": sparse.starts[1:]},
            ValueError,
            "there are 9 starts, but 9 rows must have 10",
        ),
        ({"bias": random(3)}, ValueError, "the bias has 3 numbers, but must have 9"),
        ({"x": random(1, 70).double()}, TypeError, "a tensor is Double, but must be Float"),
        ({"starts": sparse.starts.int()}, TypeError, "a tensor is Int, but must be Long"),
    ):
        with pytest.raises(error, match=sentence):
            call(**wrong)


def test_twins_agree():
    x = random(3, 70)
    linear = make()
    torch.testing.assert_close(CsrLinear(linear)(x), BitmapLinear(linear)(x))
    assert torch.equal(F.linear(x, BitmapLinear(linear).weight, linear.bias), linear(x))
