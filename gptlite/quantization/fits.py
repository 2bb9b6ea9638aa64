"""Codes that keep what a layer puts out, rather than each weight: GPTQ and AWQ; and SmoothQuant's migration.

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

COLUMNS = 64  # without groups: columns after which their errors are handed on to all that follow, in one product


def relative_error(weight: Tensor, other: Tensor, gram: Tensor | None = None) -> float:
    """How far another weight's output is from a weight's, in root mean square, for inputs with this gram matrix."""
    off = other - weight
    squares = [
        ((w if gram is None else w @ gram) * w).sum() for w in (off, weight)
    ]  # tr(W X'X W') = |X W'|^2
    return (squares[0] / squares[1]).sqrt().item()


def gptq(weight: Tensor, grid: Grid, gram: Tensor | None, damp: float = 0.01) -> Quantized:
    """Codes found column by column, each column's error made up for by those that follow (Frantar et al., 2023).

    With R upper triangular and R'R the inverse of the gram matrix, a column k that rounding moves by e costs least if
    each later column j moves by e R[k, j] / R[k, k]. A group's grid is fitted to what has become of its weights.
    """
    R, weight, found, fitted = (
        _inverse_factor(gram, weight.shape[1], damp),
        weight.float().clone(),
        [],
        [],
    )
    step, one = grid.group or COLUMNS, replace(grid, group=None)
    grid.groups(weight.shape[1])  # refuses what it does not divide
    for begin in range(0, weight.shape[1], step):
        block, factor = weight[:, begin : begin + step], R[begin : begin + step]  # views
        if grid.group or begin == 0:
            fitted.append(fit_grid(block if grid.group else weight, one))
        scale, middle = fitted[-1]
        errors = torch.empty_like(block)
        for k in range(block.shape[1]):
            column, row = block[:, k : k + 1], factor[k, begin : begin + step]
            found.append(to_codes(column, scale, middle, grid))
            errors[:, k : k + 1] = (column - from_codes(found[-1], scale, middle)) / row[k]
            block[:, k + 1 :] -= errors[:, k : k + 1] * row[k + 1 :]
        weight[:, begin + step :] -= errors @ factor[:, begin + step :]
    scales, middles = zip(*fitted, strict=True)
    return Quantized(
        torch.cat(found, 1),
        torch.cat(scales, 1),
        grid.bits,
        None if grid.symmetric else torch.cat(middles, 1),
    )


def _inverse_factor(gram: Tensor | None, K: int, damp: float) -> Tensor:
    """R (K, K), upper triangular, with R'R the inverse of the gram matrix.

    `damp` times its diagonal's mean is added to the diagonal first: a direction that no input had is not free.
    """
    _check_gram(gram, K)
    damped = gram.double() + damp * gram.diagonal().double().mean().clamp(
        min=1e-12
    ) * torch.eye(K)
    return torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True
    ).float()


def _check_gram(gram: Tensor | None, K: int) -> None:
    if gram is None or gram.shape != (K, K):
        raise ValueError(
            f"the gram matrix is {gram if gram is None else tuple(gram.shape)}, but must be {(K, K)}."
        )
    if not gram.isfinite().all():
        raise ValueError(
            f"the gram matrix has {int((~gram.isfinite()).sum())} numbers that are infinite or NaN."
        )


def awq(weight: Tensor, grid: Grid, gram: Tensor | None, tries: int = 20) -> Quantized:
    """Codes of the weight with the columns of large inputs made larger, and so rounded finer (Lin et al., 2024).

    Column k is multiplied by s_k, the root mean square of its input to some power from 0 to 1, and the input divided by
    it. The power is the one of `tries` with the least error of the output.
    """
    if gram is None:
        raise ValueError(
            "awq looks at the layer's inputs; give quantize_model tokens for calibration."
        )
    _check_gram(gram, weight.shape[1])
    size, best, least = gram.diagonal().clamp(min=1e-12).sqrt(), None, torch.inf
    for power in torch.linspace(0, 1, tries):
        s = size**power
        s = s / (s.max() * s.min()).sqrt()
        q = round_to_nearest(weight * s, grid)
        q = Quantized(q.codes, q.scale, q.bits, q.middle, input_scale=1 / s)
        error = relative_error(weight, q.dequantize(), gram)
        if best is None or error < least:
            best, least = q, error
    return best


def smooth(weights: Iterable[Tensor], most: Tensor, power: float = 0.5) -> Tensor:
    """SmoothQuant's s (K,): dividing a layer's input by it and multiplying the weights (N, K) shares out the outliers.

    `most` (K,) is the largest size that each input channel was seen to have; `power` how much of it the weights get
    (Xiao et al., 2023, equation 4).
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power is {power}, but must be from 0 to 1.")
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    return (most.clamp(min=1e-5) ** power / columns.clamp(min=1e-5) ** (1 - power)).clamp(
        min=1e-5
    )
