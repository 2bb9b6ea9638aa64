"""Pruning single weights: masks by magnitude, at once or gradually, that training cannot undo."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT


class MaskedLinear(nn.Module):
    """A Linear some of whose weights count as zero, whatever an optimizer does to them: they get no gradient."""

    def __init__(self, linear: nn.Linear, mask: Tensor):
        super().__init__()
        if mask.shape != linear.weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask is {tuple(mask.shape)} {mask.dtype}, but must be {tuple(linear.weight.shape)} torch.bool."
            )
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("mask", mask)  # (out, in), True where a weight stays

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """True for all but the given share of a weight's numbers, those nearest to zero."""
    if not 0 <= sparsity <= 1:
        raise ValueError(
            f"the sparsity is {sparsity}, but must be from 0 (all stay) to 1 (none does)."
        )
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    smallest = (
        weight.detach().abs().flatten().argsort(stable=True)
    )  # exactly so many, whatever is alike
    mask[smallest[: round(sparsity * weight.numel())]] = False
    return mask.view_as(weight)


def two_of_four_mask(weight: Tensor) -> Tensor:
    """True for the two largest of each four numbers that follow one another in a row: what sparse tensor cores read."""
    if weight.shape[-1] % 4:
        raise ValueError(f"rows of {weight.shape[-1]} weights cannot be cut into fours.")
    fours = weight.detach().abs().unflatten(-1, (-1, 4))
    mask = torch.zeros_like(fours, dtype=torch.bool)
    return mask.scatter(-1, fours.topk(2, dim=-1).indices, True).flatten(-2)


def prune_weights(model: GPT, mask_of: Callable[[Tensor], Tensor]) -> GPT:
    """The same model, in place, with masks `mask_of(weight)` on the Linears of its blocks.

    Masked already, it is masked anew: by the weights as they have become, those that were masked as zeros.
    """
    for part in [part for block in model.h for part in (block.attn, block.mlp)]:
        for name, linear in list(part.named_children()):
            if isinstance(linear, MaskedLinear):
                linear.mask.copy_(mask_of((linear.weight * linear.mask).detach()))
            else:
                setattr(part, name, MaskedLinear(linear, mask_of(linear.weight.detach())))
    return model


def bake_masks(model: GPT) -> GPT:
    """The same model, in place, with plain Linears again, whose masked weights are zeros."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MaskedLinear):
                out, wide = child.weight.shape
                linear = nn.Linear(wide, out, child.bias is not None, device="meta")
                linear.weight, linear.bias = (
                    nn.Parameter((child.weight * child.mask).detach()),
                    child.bias,
                )
                setattr(module, name, linear)
    return model


def sparsity_at(step: int, steps: int, final: float) -> float:
    """The sparsity of a step on the way to `final`: fast at first, slow at the end (Zhu and Gupta, 2017)."""
    return final * (1 - (1 - min(step, steps) / steps) ** 3)


def gradual_pruning(final: float, steps: int, every: int = 5) -> Callable[[GPT, int], None]:
    """What a training run does before its steps to take ever more weights of a masked model away, by magnitude.

    Each `every` steps the masks are chosen anew; from the given step on they stay.
    """
    if not (0 <= final <= 1 and steps >= 1 and every >= 1):
        raise ValueError(
            f"final is {final}, steps {steps} and every {every}; from 0 to 1, and at least 1, are right."
        )

    def before_step(model: GPT, step: int) -> None:
        if step == steps or (step < steps and step % every == 0):
            prune_weights(
                model, partial(magnitude_mask, sparsity=sparsity_at(step, steps, final))
            )

    return before_step
