"""GPTQ takes each best step, AWQ is no worse than rounding, SmoothQuant changes no product."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite.quantization.fits import awq, gptq, relative_error, smooth
from gptlite.quantization.grids import (
    INT4,
    Grid,
    fit_grid,
    from_codes,
    round_to_nearest,
    to_codes,
)

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
GRIDS = st.builds(Grid, st.integers(2, 5), st.sampled_from([None, 4, 8]), st.booleans())


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(n, K, seed=0, together=1.0):
    """Inputs X (n, K) whose channels have much in common."""
    return random(n, K, seed=seed) + together * random(n, 1, seed=seed + 1000) * (
        1 + random(K, seed=seed + 2000).abs()
    )


def gram_of(X):
    return X.T @ X / len(X)


def output_error(weight, other, gram):
    """The sum of (w - q)'H(w - q) over rows, in float64."""
    off = (weight - other).double()
    return ((off @ gram.double()) * off).sum().item()


# how far an output is off


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 9))
def test_the_error_of_an_output_is_known_from_the_gram_matrix(N, K, seed):
    X, weight = inputs(30, K, seed), random(N, K, seed=seed + 1)
    other = weight + 0.1 * random(N, K, seed=seed + 2)
    direct = ((X @ (other - weight).T).norm() / (X @ weight.T).norm()).item()
    assert relative_error(weight, other, gram_of(X)) == pytest.approx(direct, rel=1e-3)
    assert relative_error(weight, other) == pytest.approx(
        ((other - weight).norm() / weight.norm()).item(), rel=1e-4
    )
    assert relative_error(weight, weight, gram_of(X)) == 0
    assert relative_error(weight, 2 * weight) == pytest.approx(1)


def test_columns_whose_input_is_zero_do_not_count():
    X, weight = inputs(30, 8), random(3, 8)
    X[:, 5] = 0
    other = weight.clone()
    other[:, 5] += 100
    assert relative_error(weight, other, gram_of(X)) == 0
    assert relative_error(weight, other) > 10


# GPTQ


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_lies_between_the_best_of_all_codes_and_rounding(symmetric):
    """Of 4^4 codes a row, on the same grid, for 20 layers of correlated inputs."""
    grid, N, K = Grid(2, None, symmetric), 6, 4
    combinations = torch.tensor(
        list(itertools.product(range(-2, 2), repeat=K)), dtype=torch.int8
    )  # (256, K)
    sums = {"best": 0.0, "gptq": 0.0, "nearest": 0.0}
    for seed in range(20):
        weight, gram = random(N, K, seed=seed), gram_of(inputs(40, K, seed))
        found, nearest = gptq(weight, grid, gram, damp=1e-6), round_to_nearest(weight, grid)
        assert torch.equal(found.scale, nearest.scale)  # the same grid
        middle = found.middle
        best = 0.0
        for n in range(N):
            points = from_codes(
                combinations,
                found.scale[n].expand(len(combinations), 1),
                None if middle is None else middle[n].expand(len(combinations), 1),
            )
            off = (points - weight[n]).double()
            best += ((off @ gram.double()) * off).sum(-1).min().item()
        errors = [output_error(weight, q.dequantize(), gram) for q in (found, nearest)]
        assert all(error >= best * (1 - 1e-6) for error in errors)
        for name, error in zip(sums, (best, *errors), strict=True):
            sums[name] += error
    assert sums["best"] < sums["gptq"] < 0.8 * sums["nearest"]


@given(GRIDS, st.integers(1, 4), st.integers(0, 99))
def test_each_code_is_the_nearest_to_what_is_best_given_those_before(grid, N, seed):
    """With codes of columns C found, the rest F is best at w_F + inv(H_FF) H_FC (w_C - q_C)."""
    K = 8
    weight, gram = random(N, K, seed=seed), gram_of(inputs(50, K, seed))
    found = gptq(weight, grid, gram, damp=1e-9)
    q, H, w, group = (
        found.dequantize().double(),
        gram.double(),
        weight.double(),
        grid.group or K,
    )
    for k in range(K):
        rest = w[:, k:] + (w[:, :k] - q[:, :k]) @ H[:k, k:] @ torch.linalg.inv(H[k:, k:])
        own = slice(k // group, k // group + 1)
        if k % group == 0:  # the grid is fitted to what has become of the group
            scale, middle = fit_grid(
                rest[:, :group].float(), Grid(grid.bits, None, grid.symmetric)
            )
            torch.testing.assert_close(
                found.scale[:, own].float(), scale.float(), rtol=2**-7, atol=0
            )
            if middle is not None:
                least = 2**-7 * (
                    rest.abs().max().item() + 2**grid.bits * scale.float().max().item()
                )
                torch.testing.assert_close(
                    found.middle[:, own].float(), middle.float(), rtol=2**-7, atol=least
                )
        scale, middle = (
            found.scale[:, own],
            None if found.middle is None else found.middle[:, own],
        )
        code = to_codes(rest[:, :1].float(), scale, middle, grid)
        at = rest[:, :1] if middle is None else rest[:, :1] - middle.double()
        halfway = ((at / scale.double()) % 1 - 0.5).abs() < 1e-3
        assert ((code == found.codes[:, k : k + 1]) | halfway).all()


def test_what_is_best_given_some_is_least():
    """That the closed form of the test above is the least: by steps in every direction."""
    H, w, q = (
        gram_of(inputs(50, 6)).double(),
        random(1, 6).double(),
        random(1, 2, seed=1).double(),
    )
    best = torch.cat(
        [q, w[:, 2:] + (w[:, :2] - q) @ H[:2, 2:] @ torch.linalg.inv(H[2:, 2:])], 1
    )
    for k in range(2, 6):
        for step in (-0.01, 0.01):
            other = best.clone()
            other[:, k] += step
            assert output_error(w, other, H) > output_error(w, best, H)


@given(GRIDS, st.integers(1, 5), st.integers(0, 99), st.sampled_from([0.0, 0.01, 1.0]))
def test_where_inputs_have_nothing_in_common_it_is_rounding(grid, N, seed, damp):
    weight, sizes = random(N, 16, seed=seed), 0.1 + random(16, seed=seed + 1).abs()
    found, nearest = gptq(weight, grid, sizes.diag(), damp), round_to_nearest(weight, grid)
    assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scale, nearest.scale)
    assert found.bits == grid.bits and found.input_scale is None
    assert (found.middle is None) == grid.symmetric
    assert grid.symmetric or torch.equal(found.middle, nearest.middle)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("K", "group"), [(192, None), (150, None), (192, 64), (192, 32), (192, 96), (100, 4)]
)
def test_it_beats_rounding_on_every_grid(K, group, symmetric):
    """Also where errors are handed on block by block: without groups after 64 columns."""
    grid, weight, gram = Grid(3, group, symmetric), random(24, K), gram_of(inputs(2 * K, K))
    found, nearest = gptq(weight, grid, gram), round_to_nearest(weight, grid)
    assert found.codes.shape == (24, K) and found.codes.dtype == torch.int8
    assert found.scale.shape == nearest.scale.shape and found.scale.dtype == torch.bfloat16
    assert (found.codes >= -4).all() and (found.codes <= 3).all()
    errors = [relative_error(weight, q.dequantize(), gram) for q in (found, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_the_blocks_of_columns_change_nothing(monkeypatch):
    weight, gram = random(8, 96), gram_of(inputs(200, 96))
    codes = []
    for columns in (1, 7, 64, 1000):
        monkeypatch.setattr("gptlite.quantization.fits.COLUMNS", columns)
        codes.append(gptq(weight, Grid(4, None), gram).codes)
    for other in codes[1:]:
        assert (
            codes[0] == other
        ).float().mean() > 0.99  # a sum's order may decide about a half


def test_it_leaves_weight_and_gram_alone():
    weight, gram = random(4, 64), gram_of(inputs(100, 64))
    before = weight.clone(), gram.clone()
    gptq(weight, INT4, gram)
    awq(weight, INT4, gram)
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


def test_damping_takes_inputs_of_too_few_rows_and_dead_channels():
    X = inputs(3, 64)
    X[:, 10] = 0
    weight, gram = random(8, 64), gram_of(X)
    found = gptq(weight, Grid(3, None), gram)
    assert found.dequantize().isfinite().all()
    nearest = round_to_nearest(weight, Grid(3, None)).dequantize()
    assert relative_error(weight, found.dequantize(), gram) < 0.5 * relative_error(
        weight, nearest, gram
    )
    assert torch.equal(
        gptq(weight, INT4, torch.zeros(64, 64)).codes, round_to_nearest(weight, INT4).codes
    )


def test_damping_is_a_share_of_the_mean_of_the_diagonal():
    """On whole numbers the first weight, 33/64, goes up by e = 31/64.

    Its input has 2 in common with the second's, of size 9, which so goes down by 2 e / (9 + d).
    Half of the diagonal's mean is d = 2.5: 0.0842. (Half of the largest would be 4.5: 0.0718.)
    """
    gram = torch.tensor([[1.0, 2.0], [2.0, 9.0]])
    for second, code in ((3.578, 3), (3.590, 4)):  # 3.578 - 0.0842 < 3.5 < 3.590 - 0.0842
        weight = torch.tensor([[0.5 + 1 / 64, second, 7.0]])
        whole = torch.zeros(3, 3)
        whole[:2, :2], whole[2, 2] = gram, 5.0  # the third keeps the scale at one
        found = gptq(weight, Grid(4, None), whole, damp=0.5)
        assert found.scale.item() == 1 and found.codes.tolist() == [[1, code, 7]]


def test_fits_compute_where_the_gram_matrix_is():
    weight, gram = random(4, 64), gram_of(inputs(100, 64))
    expected = gptq(weight, INT4, gram).codes
    with torch.device("meta"):  # where all would land that is not said to be elsewhere
        assert torch.equal(gptq(weight, INT4, gram).codes, expected)


def test_no_tries_are_refused():
    with pytest.raises(ValueError, match=r"tries is 0, but must be at least 1\."):
        awq(random(2, 64), INT4, torch.eye(64), tries=0)


def test_more_damping_is_nearer_to_rounding():
    weight, gram, grid = random(8, 64), gram_of(inputs(200, 64)), Grid(4, None)
    nearest = round_to_nearest(weight, grid).codes
    moved = [
        (gptq(weight, grid, gram, damp).codes != nearest).sum().item()
        for damp in (1e-6, 1.0, 1e6)
    ]
    assert moved[0] > moved[1] > moved[2] == 0


def test_gptq_without_a_gram_matrix_that_fits_is_refused():
    with pytest.raises(
        ValueError, match=re.escape("the gram matrix is None, but must be (8, 8).")
    ):
        gptq(random(2, 8), Grid(4, None), None)
    for shape in ((7, 7), (8, 7), (8,)):
        with pytest.raises(
            ValueError, match=re.escape(f"the gram matrix is {shape}, but must be (8, 8).")
        ):
            gptq(random(2, 8), Grid(4, None), torch.ones(shape))


def test_groups_that_do_not_divide_and_weights_that_are_no_numbers_are_refused():
    with pytest.raises(
        ValueError, match=r"rows of 100 weights cannot be cut into groups of 64\."
    ):
        gptq(random(2, 100), INT4, torch.eye(100))
    weight = random(2, 64)
    weight[0, 3] = torch.nan
    for fit in (gptq, awq):
        for grid in (INT4, Grid(4, None)):
            with pytest.raises(
                ValueError, match=r"the weight has \d+ numbers that are infinite or NaN"
            ):
                fit(weight, grid, torch.eye(64))


def test_a_gram_matrix_that_is_no_number_is_refused():
    """Inputs that overflowed; it should be said of the gram matrix, not of a factorization."""
    for poison in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="gram matrix"):
            gptq(random(2, 8), Grid(4, None), torch.full((8, 8), poison))


# AWQ


@given(GRIDS, st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 1.0, 4.0]))
def test_awq_is_never_worse_than_rounding(grid, N, seed, spread):
    """Power 0, among its tries, is rounding to nearest."""
    X = inputs(40, 16, seed) * (spread * random(16, seed=seed + 5)).exp()
    weight, gram = random(N, 16, seed=seed + 6), gram_of(X)
    errors = [
        relative_error(weight, fit(weight, grid, gram).dequantize(), gram)
        for fit in (awq, round_to_nearest)
    ]
    assert errors[0] <= errors[1]
    only = awq(weight, grid, gram, tries=1)
    assert torch.equal(only.dequantize(), round_to_nearest(weight, grid).dequantize())


def test_awq_is_much_better_where_a_channel_is_large():
    X, weight = random(200, 64), random(16, 64, seed=1)
    X[:, 7] *= 50
    gram = gram_of(X)
    found, nearest = (fit(weight, Grid(3, 64), gram) for fit in (awq, round_to_nearest))
    errors = [relative_error(weight, q.dequantize(), gram) for q in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]
    assert found.input_scale.argmin() == 7


def test_the_input_scale_divides_what_the_columns_were_multiplied_by():
    X, weight = random(50, 64), random(16, 64, seed=1)
    X[:, 7] *= 50
    found = awq(weight, INT4, gram_of(X))
    assert found.input_scale.shape == (64,) and (found.input_scale != 1).any()
    product = (X * found.input_scale) @ from_codes(found.codes, found.scale).T
    torch.testing.assert_close(X @ found.dequantize().T, product, atol=1e-3, rtol=1e-4)
    again = round_to_nearest(weight / found.input_scale, INT4)
    assert (again.codes == found.codes).float().mean() > 0.99


def test_awq_takes_channels_that_are_never_used():
    X = random(50, 64)
    X[:, :10] = 0
    found = awq(random(4, 64, seed=1), INT4, gram_of(X))
    assert found.dequantize().isfinite().all() and found.input_scale.isfinite().all()


def test_awq_without_a_gram_matrix_that_fits_is_refused():
    with pytest.raises(
        ValueError,
        match=r"awq looks at the layer's inputs; give quantize_model tokens for calibration\.",
    ):
        awq(random(2, 64), INT4, None)
    with pytest.raises(
        ValueError, match=re.escape("the gram matrix is (63, 63), but must be (64, 64).")
    ):
        awq(random(2, 64), INT4, torch.eye(63))


# SmoothQuant


@given(
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_smoothing_changes_no_product(power, N, K, seed):
    x, weight = inputs(10, K, seed), random(N, K, seed=seed + 1)
    s = smooth([weight], x.abs().amax(0), power)
    assert s.shape == (K,) and (s > 0).all()
    torch.testing.assert_close((x / s) @ (weight * s).T, x @ weight.T, atol=1e-3, rtol=1e-4)


def test_half_and_half_makes_the_peaks_of_both_sides_equal():
    x, weights = inputs(10, 16), [random(4, 16, seed=1), random(3, 16, seed=2)]
    x[:, 3] *= 100
    s = smooth(weights, x.abs().amax(0))
    columns = torch.cat(weights).abs().amax(0)
    torch.testing.assert_close((x / s).abs().amax(0), columns * s)
    torch.testing.assert_close(smooth(weights, x.abs().amax(0), 0.5), s)


def test_the_power_is_how_much_the_weights_take_over():
    x, weight = inputs(10, 16), random(4, 16, seed=1)
    most = x.abs().amax(0)
    torch.testing.assert_close((x / smooth([weight], most, 1.0)).abs().amax(0), torch.ones(16))
    torch.testing.assert_close(
        (weight * smooth([weight], most, 0.0)).abs().amax(0), torch.ones(16)
    )


def test_channels_of_zeros_get_a_number_all_the_same():
    weight = random(4, 8)
    weight[:, 2] = 0
    s = smooth([weight], torch.zeros(8))
    assert s.isfinite().all() and (s > 0).all()


@pytest.mark.parametrize("power", [-0.1, 1.1, float("nan"), float("inf")])
def test_powers_that_are_no_share_are_refused(power):
    with pytest.raises(
        ValueError, match=re.escape(f"power is {power}, but must be from 0 to 1.")
    ):
        smooth([random(2, 8)], torch.ones(8), power)
