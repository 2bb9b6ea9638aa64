"""Training around rounded weights: through the rounding (QAT), or beside it (QLoRA)."""

from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT
from gptlite.quantization.grids import Grid, refuse_nonfinite, round_to_nearest


class QATLinear(nn.Module):
    """A Linear that computes with the nearest points of a grid, and learns as if it did not.

    The gradient passes the rounding unchanged (straight through; Bengio et al., 2013), to a
    weight that stays in full precision.
    """

    def __init__(self, linear: nn.Linear, grid: Grid):
        super().__init__()
        self.weight, self.bias, self.grid = linear.weight, linear.bias, grid

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach()
        off = round_to_nearest(weight, self.grid).dequantize().to(weight.dtype) - weight
        return F.linear(x, self.weight + off, self.bias)


@cache
def nf4_levels() -> Tensor:
    """NF4's 16 numbers from -1 to 1, at equal steps of a normal distribution's probability.

    Eight are above zero, one is zero, seven below: as in bitsandbytes, whose outermost quantile
    this takes over (Dettmers et al., 2023).
    """
    tail = 0.9677083
    with torch.device("cpu"):
        above, below = (
            torch.special.ndtri(torch.linspace(tail, 0.5, n, dtype=torch.float64)[:-1])
            for n in (9, 8)
        )
        levels = torch.cat([above, torch.zeros(1), -below])
    return (levels / levels.max()).sort().values.float()


class NF4Linear(nn.Module):
    """A frozen Linear in NF4: codes of four bits, two a byte, and a scale for each `group`.

    The scale is in bfloat16. The weight is dequantized for each product, so that a gradient
    reaches the input; it has none itself.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, group: int = 64):
        super().__init__()
        weight = linear.weight.detach().float()
        refuse_nonfinite(weight)
        if group < 2 or weight.shape[1] % group or group % 2:
            raise ValueError(
                f"rows of {weight.shape[1]} weights cannot be cut into groups of {group}, "
                "or those into pairs."
            )
        groups, levels = weight.unflatten(-1, (-1, group)), nf4_levels().to(weight.device)
        scale = groups.abs().amax(-1).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        halfway = (levels[1:] + levels[:-1]) / 2
        nearest = torch.bucketize(groups / scale.float()[..., None], halfway)
        codes = nearest.to(torch.uint8).flatten(-2)
        self.register_buffer("codes", codes[:, ::2] | codes[:, 1::2] << 4)  # (N, K / 2)
        self.register_buffer("scale", scale)  # (N, groups)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the codes stand for, in float32, computed each time."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2).int()
        groups = nf4_levels().to(codes.device)[codes].unflatten(-1, (self.scale.shape[1], -1))
        return (groups * self.scale.float()[..., None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class LoRALinear(nn.Module):
    """A frozen Linear's answer, plus alpha / rank times B A x, of which A and B alone learn.

    B begins at zero, and so the whole begins as the frozen Linear (Hu et al., 2022).
    """

    def __init__(
        self, base: nn.Module, shape: tuple[int, int], rank: int = 8, alpha: float = 16.0
    ):
        super().__init__()
        if not 1 <= rank <= min(shape):
            raise ValueError(
                f"rank is {rank}, but for a weight of {shape} must be from 1 to {min(shape)}."
            )
        device = next(iter(base.state_dict().values())).device
        self.base, self.factor = base, alpha / rank
        self.A = nn.Parameter(torch.randn(rank, shape[1], device=device) / shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(shape[0], rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.factor * F.linear(F.linear(x, self.A), self.B)


def qlora(model: GPT, rank: int = 8, group: int = 64) -> GPT:
    """The same model, in place, with every Linear of its blocks in NF4 beside a LoRA adapter.

    All else is frozen.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already; begin with a copy of the original.")
    frozen = list(model.parameters())

    def adapted(linear: nn.Linear) -> LoRALinear:
        shape = linear.out_features, linear.in_features
        return LoRALinear(NF4Linear(linear, group), shape, rank)

    model.swap_linears(adapted, where=lambda name, _: name.startswith("h."))
    for parameter in frozen:
        parameter.requires_grad_(False)
    return model
