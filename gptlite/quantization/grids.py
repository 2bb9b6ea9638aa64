"""Grids of few numbers on which weights may lie, and the nearest point of one."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where weights may lie: at scale * code + middle, with codes of `bits` bits.

    Codes begin at -2^(bits-1). A `group` of weights that follow one another in a row shares
    scale and middle; None is the whole row. A symmetric grid has no middle: it lies around
    zero. With `clip` a grid may end before its group's largest weight.
    """

    bits: int = 4
    group: int | None = 64
    symmetric: bool = True
    clip: bool = False

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}, but must be from 2 to 8.")
        if self.group is not None and self.group < 1:
            raise ValueError(
                f"group is {self.group}, but must be at least 1, or None for the whole row."
            )

    @property
    def lowest(self) -> int:
        """The lowest code; the highest is -lowest - 1."""
        return -(2 ** (self.bits - 1))

    def groups(self, K: int) -> int:
        """How many groups a row of K weights has."""
        if K % (self.group or K):
            raise ValueError(f"rows of {K} weights cannot be cut into groups of {self.group}.")
        return K // (self.group or K)

    def bits_per_weight(self, K: int) -> float:
        """Bits that a weight takes in a row of K, those of scale and middle counted."""
        return self.bits + (16 if self.symmetric else 32) * self.groups(K) / K


INT8, INT4 = Grid(8, None), Grid(4, 64)
# of a group's range, among which `clip` chooses
SHARES = [share / 100 for share in range(95, 35, -5)]


@dataclass(frozen=True)
class Quantized:
    """Codes (N, K) int8, and bfloat16 scale and middle (N, groups); no middle means zero.

    Where there is an `input_scale` (K,), a product's input is multiplied by it first.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    middle: Tensor | None = None
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weights (N, K) that the codes stand for, in float32."""
        return from_codes(self.codes, self.scale, self.middle, self.input_scale)


def fit_grid(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The scale and middle (N, groups) with which a grid spans each group of weights (N, K).

    With `clip` it spans that one of SHARES of it, about its centre, with which the mean square
    of the error is least. They are in bfloat16, which has float32's range, so that neither an
    outlier nor a group of denormal numbers is beyond it.
    """
    refuse_nonfinite(weight)
    # (N, groups, group)
    groups = weight.float().unflatten(-1, (grid.groups(weight.shape[-1]), -1))
    scale, middle = _span(groups, grid)
    if not grid.clip:
        return scale, middle
    least = _square_error(groups, scale, middle, grid)
    for share in SHARES:
        tried, shifted = _span(groups, grid, share)
        error = _square_error(groups, tried, shifted, grid)
        better = error < least
        least, scale = error.where(better, least), tried.where(better, scale)
        middle = None if middle is None or shifted is None else shifted.where(better, middle)
    return scale, middle


def _span(groups: Tensor, grid: Grid, share: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scale and middle (N, groups) of a grid that spans a share of each group's range."""
    if grid.symmetric:
        return _nonzero(share * groups.abs().amax(-1) / (-grid.lowest - 1)), None
    least, most = groups.aminmax(dim=-1)
    cut = (1 - share) / 2 * (most - least)
    least, most = least + cut, most - cut
    scale = _nonzero((most - least) / (2**grid.bits - 1))
    return scale, (least - grid.lowest * scale.float()).bfloat16()


def _square_error(groups: Tensor, scale: Tensor, middle: Tensor | None, grid: Grid) -> Tensor:
    """Sum of the squares (N, groups) of what rounding does to weights (N, groups, group)."""
    rounded = from_codes(to_codes(groups.flatten(-2), scale, middle, grid), scale, middle)
    return (rounded.view_as(groups) - groups).square().sum(-1)


def refuse_nonfinite(weight: Tensor) -> None:
    """A ValueError counts the numbers that no code can stand for."""
    wrong = int((~weight.isfinite()).sum())
    if wrong:
        raise ValueError(f"the weight has {wrong} numbers that are infinite or NaN.")


def _nonzero(scale: Tensor) -> Tensor:
    """In bfloat16; where all weights are equal, any scale will do."""
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()


def to_codes(weight: Tensor, scale: Tensor, middle: Tensor | None, grid: Grid) -> Tensor:
    """The nearest codes (N, K) of weights (N, K), given what their groups (N, groups) have."""
    groups = weight.float().unflatten(-1, (scale.shape[-1], -1))
    shifted = groups if middle is None else groups - middle.float()[..., None]
    codes = (shifted / scale.float()[..., None]).round()
    return codes.clamp(grid.lowest, -grid.lowest - 1).flatten(-2).to(torch.int8)


def from_codes(
    codes: Tensor,
    scale: Tensor,
    middle: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """The weights (..., K), in float32, of codes (..., K), given what their groups have.

    Scale and middle are (..., groups), the input scale (K,).
    """
    weight = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]
    weight = (weight if middle is None else weight + middle.float()[..., None]).flatten(-2)
    return weight if input_scale is None else weight * input_scale


def round_to_nearest(weight: Tensor, grid: Grid, gram: Tensor | None = None) -> Quantized:
    """Each weight on the nearest point of its group's grid; `gram` is not looked at.

    It is off by half a scale at most. (The outermost weights may be off by more with `clip`,
    and by a little more with a middle, itself rounded.)
    """
    scale, middle = fit_grid(weight, grid)
    return Quantized(to_codes(weight, scale, middle, grid), scale, grid.bits, middle)
