"""Training around rounded weights: through the rounding (QAT), or beside it (QLoRA: NF4 and low-rank adapters)."""

from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT
from gptlite.quantization.grids import Grid, refuse_nonfinite, round_to_nearest


class QATLinear(nn.Module):
    """A Linear that computes with the nearest points of a grid, and learns as if it did not (Bengio et al., 2013).

    The gradient passes the rounding unchanged (straight through), to a weight that stays in full precision.
    """

    def __init__(self, linear: nn.Linear, grid: Grid):
        super().__init__()
        self.weight, self.bias, self.grid = linear.weight, linear.bias, grid

    def forward(self, x: Tensor) -> Tensor:
        off = (
            round_to_nearest(self.weight.detach(), self.grid).dequantize()
            - self.weight.detach()
        )
        return F.linear(x, self.weight + off, self.bias)


@cache
def nf4_levels() -> Tensor:
    """NF4's 16 numbers from -1 to 1, at equal steps of a normal distribution's probability (Dettmers et al., 2023).

    Eight are above zero, one is zero, seven below: as in bitsandbytes, whose outermost quantile this takes over.
    """
    tail = 0.9677083
    above, below = (
        torch.special.ndtri(torch.linspace(tail, 0.5, n, dtype=torch.float64)[:-1])
        for n in (9, 8)
    )
    levels = torch.cat([above, torch.zeros(1), -below])
    return (levels / levels.max()).sort().values.float()


class NF4Linear(nn.Module):
    """A frozen Linear in NF4: codes of four bits, two a byte, and a bfloat16 scale for each `group` weights of a row.

    It is dequantized for each product, so that a gradient reaches the input; the weight has none.
    """

    def __init__(self, linear: nn.Linear, group: int = 64):
        super().__init__()
        weight = linear.weight.detach().float()
        refuse_nonfinite(weight)
        if group < 2 or weight.shape[1] % group or group % 2:
            raise ValueError(
                f"rows of {weight.shape[1]} weights cannot be cut into groups of {group}, or those into pairs."
            )
        groups = weight.unflatten(-1, (-1, group))
        scale = groups.abs().amax(-1).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        halfway = (nf4_levels()[1:] + nf4_levels()[:-1]) / 2
        codes = (
            torch.bucketize(groups / scale.float()[..., None], halfway)
            .to(torch.uint8)
            .flatten(-2)
        )
        self.register_buffer("codes", codes[:, ::2] | codes[:, 1::2] << 4)  # (N, K / 2)
        self.register_buffer("scale", scale)  # (N, groups)
        self.bias = (
            None
            if linear.bias is None
            else nn.Parameter(linear.bias.detach(), requires_grad=False)
        )

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the codes stand for, in float32, computed anew each time."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2).int()
        groups = nf4_levels().to(codes.device)[codes].unflatten(-1, (self.scale.shape[1], -1))
        return (groups * self.scale.float()[..., None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class LoRALinear(nn.Module):
    """What a frozen Linear says, plus alpha / rank times B A x, of which A and B alone learn (Hu et al., 2022).

    B begins at zero, and so the whole begins as the frozen Linear.
    """

    def __init__(
        self, base: nn.Module, shape: tuple[int, int], rank: int = 8, alpha: float = 16.0
    ):
        super().__init__()
        if not 1 <= rank <= min(shape):
            raise ValueError(
                f"rank is {rank}, but for a weight of {shape} must be from 1 to {min(shape)}."
            )
        self.base, self.factor = base, alpha / rank
        self.A = nn.Parameter(torch.randn(rank, shape[1]) / shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(shape[0], rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.factor * F.linear(F.linear(x, self.A), self.B)


def qlora(model: GPT, rank: int = 8, group: int = 64) -> GPT:
    """The same model, in place, with every Linear of its blocks in NF4 beside a LoRA adapter, and all else frozen."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already; begin with a copy of the original.")
    model.requires_grad_(False)
    for block in model.h:
        for parent in (block.attn, block.mlp):
            for name, linear in list(parent.named_children()):
                setattr(
                    parent,
                    name,
                    LoRALinear(NF4Linear(linear, group), tuple(linear.weight.shape), rank),
                )
    return model
