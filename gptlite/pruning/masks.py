"""Pruning single weights: masks by magnitude that training cannot undo."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT


class MaskedLinear(nn.Module):
    """A Linear some of whose weights count as zero, whatever an optimizer does to them.

    They get no gradient.
    """

    weight: Tensor
    bias: nn.Parameter | None
    mask: Tensor

    def __init__(self, linear: "nn.Linear | MaskedLinear", mask: Tensor):
        super().__init__()
        if mask.shape != linear.weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask is {tuple(mask.shape)} {mask.dtype}, but must be "
                f"{tuple(linear.weight.shape)} torch.bool."
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
    # in an order, so that exactly so many go, whatever is alike
    smallest = weight.detach().abs().flatten().argsort(stable=True)
    mask[smallest[: round(sparsity * weight.numel())]] = False
    return mask.view_as(weight)


def two_of_four_mask(weight: Tensor) -> Tensor:
    """True for the two largest of each four numbers in a row, as sparse tensor cores read."""
    if weight.shape[-1] % 4:
        raise ValueError(f"rows of {weight.shape[-1]} weights cannot be cut into fours.")
    fours = weight.detach().abs().unflatten(-1, (-1, 4))
    mask = torch.zeros_like(fours, dtype=torch.bool)
    return mask.scatter(-1, fours.topk(2, dim=-1).indices, True).flatten(-2)


def prune_weights(model: GPT, mask_of: Callable[[Tensor], Tensor]) -> GPT:
    """The same model, in place, with masks `mask_of(weight)` on the Linears of its blocks.

    Masked already, it is masked anew: by the weights as they have become, those that were
    masked as zeros. All masks are made before the first is set.
    """
    made: dict[str, MaskedLinear] = {}
    for name, linear in model.named_modules():
        if name.startswith("h.") and isinstance(linear, MaskedLinear):
            made[name] = MaskedLinear(linear, mask_of((linear.weight * linear.mask).detach()))
        elif name.startswith("h.") and isinstance(linear, nn.Linear):
            made[name] = MaskedLinear(linear, mask_of(linear.weight.detach()))
    if not made:
        raise ValueError(
            "the blocks have no Linear to mask; begin with a copy of the original."
        )
    for name, new in made.items():
        old = model.get_submodule(name)
        if isinstance(old, MaskedLinear):
            old.mask.copy_(new.mask)
        else:
            model.set_submodule(name, new)
    return model


def bake_masks(model: GPT) -> GPT:
    """The same model, in place, with plain Linears again, whose masked weights are zeros."""
    for name, masked in list(model.named_modules()):
        if isinstance(masked, MaskedLinear):
            out, wide = masked.weight.shape
            linear = nn.Linear(wide, out, masked.bias is not None, device="meta")
            linear.weight = nn.Parameter((masked.weight * masked.mask).detach())
            linear.register_parameter("bias", masked.bias)
            model.set_submodule(name, linear)
    return model


def sparsity_at(step: int, steps: int, final: float) -> float:
    """The sparsity on the way to `final`: fast at first, slow at the end (Zhu, Gupta, 2017)."""
    return final * (1 - (1 - min(step, steps) / steps) ** 3)


def gradual_pruning(final: float, steps: int, every: int = 5) -> Callable[[GPT, int], None]:
    """A function for before each step of training that takes ever more weights away.

    Each `every` steps the masks are chosen anew, by magnitude; from step `steps` on they stay.
    """
    if not (0 <= final <= 1 and steps >= 1 and every >= 1):
        raise ValueError(
            f"final is {final}, steps {steps} and every {every}; from 0 to 1, and at least 1, "
            "are right."
        )

    def before_step(model: GPT, step: int) -> None:
        if step == steps or (step < steps and step % every == 0):
            sparsity = sparsity_at(step, steps, final)
            prune_weights(model, partial(magnitude_mask, sparsity=sparsity))

    return before_step
