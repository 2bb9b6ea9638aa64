"""Every weight lies within half a scale of what it was; what no grid can hold is refused."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlite.quantization.grids import (
    INT4,
    INT8,
    Grid,
    Quantized,
    from_codes,
    round_to_nearest,
    to_codes,
)

GRIDS = st.builds(Grid, st.integers(2, 8), st.sampled_from([None, 1, 2, 8]), st.booleans())
TINY = torch.finfo(torch.bfloat16).tiny
SIZES = st.sampled_from([0.0, 1e-42, 1e-38, 1e-20, 1e-4, 1.0, 300.0, 1e30])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slack(weight: torch.Tensor, q: Quantized, grid: Grid) -> torch.Tensor:
    """What a weight (N, K) may be off by: half a scale; with a middle, their roundings, too.

    A symmetric grid's scale is off by 1/512 at most, and so its highest point by less than half
    a scale.
    """
    scale = q.scale.double()
    off = scale / 2 * (1 + 1e-4)
    if not grid.symmetric:
        off = off + 2**-8 * (2**grid.bits * scale + q.middle.double().abs()) + 1e-40
    return off.repeat_interleave(weight.shape[1] // scale.shape[1], 1)


@given(
    GRIDS,
    st.integers(1, 5),
    st.integers(1, 4),
    SIZES,
    st.sampled_from([None, 1e30, -1e30, 1e-44]),
    st.integers(0, 99),
)
def test_a_weight_is_off_by_half_a_scale_at_most(grid, N, eights, size, outlier, seed):
    weight = size * random(N, 8 * eights, seed=seed)
    if outlier is not None:
        weight[seed % N, seed % (8 * eights)] = outlier
    q = round_to_nearest(weight, grid)
    back = q.dequantize()
    assert q.codes.shape == back.shape == weight.shape
    assert (
        q.codes.dtype == torch.int8
        and back.dtype == torch.float32
        and q.scale.dtype == torch.bfloat16
    )
    assert q.bits == grid.bits and q.input_scale is None
    assert q.scale.shape == (N, grid.groups(8 * eights)) and (q.scale >= TINY).all()
    assert (q.middle is None) == grid.symmetric
    assert (q.codes >= -(2 ** (grid.bits - 1))).all() and (
        q.codes <= 2 ** (grid.bits - 1) - 1
    ).all()
    assert back.isfinite().all()
    assert ((back.double() - weight.double()).abs() <= slack(weight, q, grid)).all()


@given(GRIDS, st.integers(0, 99), st.sampled_from([1e-3, 1.0, 50.0]))
def test_no_other_code_is_nearer(grid, seed, size):
    weight = size * random(3, 16, seed=seed)
    q = round_to_nearest(weight, grid)
    every = torch.arange(grid.lowest, -grid.lowest, dtype=torch.int8)  # (2^bits,)
    points = torch.stack([from_codes(code.expand(3, 16), q.scale, q.middle) for code in every])
    least = (points - weight).abs().amin(0)
    torch.testing.assert_close(
        (q.dequantize() - weight).abs(), least, atol=1e-5 * size, rtol=1e-5
    )


def test_all_zeros_stay_zeros():
    for grid in (INT4, INT8, Grid(3, 16), Grid(4, 64, symmetric=False)):
        assert torch.equal(
            round_to_nearest(torch.zeros(3, 128), grid).dequantize(), torch.zeros(3, 128)
        )


def test_an_outlier_costs_its_own_group_alone():
    weight = random(1, 192)
    alone = round_to_nearest(weight, INT4).dequantize()
    weight[0, 70] = 1e30
    back = round_to_nearest(weight, INT4).dequantize()
    assert torch.equal(back[:, :64], alone[:, :64]) and torch.equal(
        back[:, 128:], alone[:, 128:]
    )
    assert back[0, 70].item() == pytest.approx(1e30, rel=1 / 256)
    assert back[0, 64:70].abs().max() == 0


def test_a_middle_halves_the_step_where_all_weights_are_of_one_sign():
    weight = random(4, 64).abs()
    one, two = (
        round_to_nearest(weight, Grid(4, 64, symmetric)).scale.float()
        for symmetric in (True, False)
    )
    assert (two < 0.55 * one).all()
    errors = [
        (round_to_nearest(weight, Grid(4, 64, s)).dequantize() - weight).square().mean()
        for s in (True, False)
    ]
    assert errors[1] < 0.4 * errors[0]


def test_equal_weights_are_kept_by_the_middle():
    weight = torch.full((2, 64), 3.0)
    assert torch.equal(
        round_to_nearest(weight, Grid(2, 64, symmetric=False)).dequantize(), weight
    )


def test_a_tiny_example_by_hand():
    weight = torch.tensor([[7.0, -3.4, 0.6, -7.0, 14.0, 1.1, -0.9, 3.1]])
    q = round_to_nearest(weight, Grid(4, 4))
    assert q.scale.tolist() == [[1.0, 2.0]]
    assert q.codes.tolist() == [[7, -3, 1, -7, 7, 1, 0, 2]]
    assert q.dequantize().tolist() == [[7.0, -3.0, 1.0, -7.0, 14.0, 2.0, 0.0, 4.0]]
    q = round_to_nearest(torch.tensor([[1.0, 2.0, 4.0, 2.9]]), Grid(2, None, symmetric=False))
    assert q.scale.tolist() == [[1.0]] and q.middle.tolist() == [[3.0]]
    assert q.codes.tolist() == [[-2, -1, 1, 0]]
    assert q.dequantize().tolist() == [[1.0, 2.0, 4.0, 3.0]]


def test_weights_in_bfloat16_are_weights():
    weight = random(3, 64).bfloat16()
    for grid in (INT4, Grid(4, 64, symmetric=False)):
        assert torch.equal(
            round_to_nearest(weight, grid).dequantize(),
            round_to_nearest(weight.float(), grid).dequantize(),
        )


@given(GRIDS, st.integers(1, 4))
def test_what_lies_beyond_the_grid_gets_its_ends(grid, N):
    scale = torch.ones(N, 1).bfloat16()
    middle = None if grid.symmetric else torch.zeros(N, 1).bfloat16()
    weight = torch.tensor([-1e6, 1e6]).expand(N, 2)
    assert (
        to_codes(weight, scale, middle, grid).tolist() == [[grid.lowest, -grid.lowest - 1]] * N
    )


@given(st.integers(2, 8), st.integers(1, 9), st.sampled_from([None, 1, 16]), st.booleans())
def test_codes_come_back_from_the_weights_that_they_stand_for(bits, N, group, symmetric):
    grid, rng = Grid(bits, group, symmetric), torch.Generator().manual_seed(N)
    codes = torch.randint(grid.lowest, -grid.lowest, (N, 32), generator=rng).to(torch.int8)
    scale = (0.5 + torch.rand(N, grid.groups(32), generator=rng)).bfloat16()
    middle = None if symmetric else torch.randn(scale.shape, generator=rng).bfloat16()
    assert torch.equal(to_codes(from_codes(codes, scale, middle), scale, middle, grid), codes)


@given(GRIDS, st.integers(1, 4), SIZES, st.integers(0, 99))
def test_a_clipped_grid_is_never_worse_than_one_that_holds_all(grid, N, size, seed):
    weight = size * random(N, 16, seed=seed)
    groups = (N, grid.groups(16), -1)
    plain, clipped = (round_to_nearest(weight, g) for g in (grid, replace(grid, clip=True)))
    off = [(q.dequantize() - weight).view(groups).square().sum(-1) for q in (plain, clipped)]
    assert clipped.dequantize().isfinite().all() and clipped.scale.shape == plain.scale.shape
    assert (off[1] <= off[0]).all()
    assert (clipped.scale.float() <= plain.scale.float() * (1 + 2**-8)).all()


@pytest.mark.parametrize(("bits", "least_gain"), [(4, 0.03), (3, 0.1), (2, 0.3)])
def test_the_fewer_the_bits_the_more_is_worth_clipping(bits, least_gain):
    weight = random(64, 256)
    grids = Grid(bits, 64), Grid(bits, 64, clip=True)
    plain, clipped = (
        (round_to_nearest(weight, grid).dequantize() - weight).norm() for grid in grids
    )
    assert clipped < (1 - least_gain) * plain


def test_clipping_gives_up_the_one_weight_that_costs_the_others_their_places():
    weight = torch.tensor([[1.0, -1.0] * 31 + [1.0, 2.0]])
    plain, clipped = (
        round_to_nearest(weight, Grid(2, None, clip=clip)) for clip in (False, True)
    )
    assert plain.scale.tolist() == [[2.0]] and clipped.scale.tolist() == [[1.0]]
    assert clipped.dequantize().tolist() == [[1.0, -1.0] * 31 + [1.0, 1.0]]


def test_the_input_scale_is_a_factor_of_the_columns():
    q, s = round_to_nearest(random(3, 64), INT4), torch.rand(64) + 0.5
    scaled = Quantized(q.codes, q.scale, q.bits, input_scale=s)
    assert torch.equal(scaled.dequantize(), q.dequantize() * s)


def test_bits_per_weight_by_hand():
    assert INT4.bits_per_weight(768) == 4.25
    assert INT8.bits_per_weight(768) == 8 + 16 / 768
    assert Grid(4, 64, symmetric=False).bits_per_weight(768) == 4.5
    assert Grid(4, 128).bits_per_weight(768) == 4.125
    assert Grid(2, None, symmetric=False).bits_per_weight(64) == 2.5


@given(GRIDS, st.integers(1, 5), st.integers(1, 4))
def test_bits_per_weight_are_those_of_the_tensors(grid, N, eights):
    q = round_to_nearest(random(N, 8 * eights), grid)
    bits = q.codes.numel() * grid.bits + 8 * (
        q.scale.nbytes + (0 if q.middle is None else q.middle.nbytes)
    )
    assert bits == pytest.approx(grid.bits_per_weight(8 * eights) * q.codes.numel())


@pytest.mark.parametrize("grid", [INT8, INT4, Grid(4, 64, symmetric=False)])
def test_numbers_that_no_grid_holds_are_counted(grid):
    weight = random(2, 64)
    weight[0, :3], weight[1, 5], weight[1, 9] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(
        ValueError, match=r"^the weight has 5 numbers that are infinite or NaN\.$"
    ):
        round_to_nearest(weight, grid)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_that_codes_cannot_have(bits):
    with pytest.raises(
        ValueError, match=re.escape(f"bits is {bits}, but must be from 2 to 8.")
    ):
        Grid(bits)


def test_groups_that_do_not_fit():
    for group in (0, -64):
        with pytest.raises(
            ValueError,
            match=f"group is {group}, but must be at least 1, or None for the whole row",
        ):
            Grid(4, group)
    for do in (
        INT4.groups,
        INT4.bits_per_weight,
        lambda K: round_to_nearest(torch.ones(2, K), INT4),
    ):
        with pytest.raises(
            ValueError, match=r"^rows of 100 weights cannot be cut into groups of 64\.$"
        ):
            do(100)


@given(GRIDS, st.sampled_from([1e38, 2e-38]))
def test_nearly_the_largest_and_the_least_floats_have_a_grid(grid, size):
    weight = size * torch.tensor([[1.0, -1.0, 0.5, 0.0, 1.0, 1.0, -0.25, 0.75]])
    q = round_to_nearest(weight, grid)
    assert q.scale.isfinite().all() and (q.scale > 0).all()
    assert ((q.dequantize().double() - weight.double()).abs() <= slack(weight, q, grid)).all()


@settings(max_examples=10)
@given(st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_a_grid_is_fitted_group_by_group(N, groups):
    weight = random(N, 32, seed=N)
    whole = round_to_nearest(weight, Grid(4, 32 // groups))
    parts = [round_to_nearest(part, Grid(4, None)) for part in weight.split(32 // groups, 1)]
    assert torch.equal(whole.codes, torch.cat([p.codes for p in parts], 1))
    assert torch.equal(whole.scale, torch.cat([p.scale for p in parts], 1))
