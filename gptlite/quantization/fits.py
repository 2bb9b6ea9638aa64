"""Codes that keep what a layer puts out, rather than each weight: GPTQ, AWQ; and SmoothQuant.

What the first two know of the data is the gram matrix X'X / n of a layer's inputs X (n, K).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from gptlite.quantization.grids import (
    Grid,
    Quantized,
    fit_grid,
    from_codes,
    round_to_nearest,
    to_codes,
)

# without groups: columns after which their errors are handed on to all that follow at once
COLUMNS = 64


def relative_error(weight: Tensor, other: Tensor, gram: Tensor | None = None) -> float:
    """How far another weight's output is from a weight's, in root mean square.

    It is for inputs with this gram matrix; None stands for inputs with nothing in common.
    """
    # tr(W X'X W') = |X W'|^2
    off, all_of_it = (
        ((w if gram is None else w @ gram) * w).sum() for w in (other - weight, weight)
    )
    return (off / all_of_it).sqrt().item()


def gptq(weight: Tensor, grid: Grid, gram: Tensor | None, damp: float = 0.01) -> Quantized:
    """Codes found column by column, each column's error made up for by those that follow.

    With R upper triangular and R'R the inverse of the gram matrix, a column k that rounding
    moves by e costs least if each later column j moves by e R[k, j] / R[k, k]. A group's grid
    is fitted to what has become of its weights (Frantar et al., 2023).
    """
    R = _inverse_factor(gram, weight.shape[1], damp)
    grid.groups(weight.shape[1])  # refuses what it does not divide
    weight = weight.float().clone()
    step, one = grid.group or COLUMNS, replace(grid, group=None)
    codes, scales, middles = list[Tensor](), list[Tensor](), list[Tensor]()
    for begin in range(0, weight.shape[1], step):
        block, factor = weight[:, begin : begin + step], R[begin : begin + step]  # views
        if grid.group or begin == 0:
            scale, middle = fit_grid(block if grid.group else weight, one)
            scales.append(scale)
            middles += [] if middle is None else [middle]
        errors = torch.empty_like(block)
        for k in range(block.shape[1]):
            column, row = block[:, k : k + 1], factor[k, begin : begin + step]
            codes.append(to_codes(column, scale, middle, grid))
            errors[:, k : k + 1] = (column - from_codes(codes[-1], scale, middle)) / row[k]
            block[:, k + 1 :] -= errors[:, k : k + 1] * row[k + 1 :]
        weight[:, begin + step :] -= errors @ factor[:, begin + step :]
    shift = torch.cat(middles, 1) if middles else None
    return Quantized(torch.cat(codes, 1), torch.cat(scales, 1), grid.bits, shift)


def _inverse_factor(gram: Tensor | None, K: int, damp: float) -> Tensor:
    """R (K, K), upper triangular, with R'R the inverse of the gram matrix.

    `damp` times its diagonal's mean is added to the diagonal first: a direction that no input
    had is not free.
    """
    gram = _checked_gram(gram, K).double()
    size = gram.diagonal().mean().clamp(min=1e-12)
    damped = gram + damp * size * torch.eye(K, dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _checked_gram(gram: Tensor | None, K: int) -> Tensor:
    """The gram matrix; a ValueError says what is wrong with it."""
    if gram is None or gram.shape != (K, K):
        shape = gram if gram is None else tuple(gram.shape)
        raise ValueError(f"the gram matrix is {shape}, but must be {(K, K)}.")
    wrong = int((~gram.isfinite()).sum())
    if wrong:
        raise ValueError(f"the gram matrix has {wrong} numbers that are infinite or NaN.")
    return gram


def awq(weight: Tensor, grid: Grid, gram: Tensor | None, tries: int = 20) -> Quantized:
    """Codes of the weight with the columns of large inputs made larger, and so rounded finer.

    Column k is multiplied by s_k, the root mean square of its input to some power from 0 to 1,
    and the input divided by it. The power is the one of `tries` with the least error of the
    output (Lin et al., 2024).
    """
    if gram is None:
        raise ValueError(
            "awq looks at the layer's inputs; give quantize_model tokens for calibration."
        )
    if tries < 1:
        raise ValueError(f"tries is {tries}, but must be at least 1.")
    size = _checked_gram(gram, weight.shape[1]).diagonal().clamp(min=1e-12).sqrt()

    def scaled(power: float) -> Quantized:
        s = size**power
        s = s / (s.max() * s.min()).sqrt()
        return replace(round_to_nearest(weight * s, grid), input_scale=1 / s)

    def error(power: float) -> float:
        return relative_error(weight, scaled(power).dequantize(), gram)

    return scaled(min(torch.linspace(0, 1, tries).tolist(), key=error))


def smooth(weights: Iterable[Tensor], most: Tensor, power: float = 0.5) -> Tensor:
    """SmoothQuant's s (K,): inputs are divided by it, and the weights (N, K) multiplied.

    So they share the outliers. `most` (K,) is the largest size that each input channel was seen
    to have; `power` how much of it the weights get (Xiao et al., 2023, equation 4).
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power is {power}, but must be from 0 to 1.")
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = most.clamp(min=1e-5) ** power / columns.clamp(min=1e-5) ** (1 - power)
    return s.clamp(min=1e-5)
