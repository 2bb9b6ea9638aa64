"""Inputs in eight bits, too: with a scale found anew for each token, or one that is fixed."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT, watch
from gptlite.quantization.fits import smooth
from gptlite.quantization.grids import INT8, round_to_nearest


@torch.no_grad()
def input_peaks(model: GPT, idx: Tensor) -> dict[nn.Module, Tensor]:
    """The largest size (K,) of each input channel of every Linear, as it reads idx (B, T)."""
    peaks: dict[nn.Module, Tensor] = {}

    def note(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        peaks[linear] = inputs[0].abs().flatten(0, -2).amax(0)

    with watch([m for m in model.modules() if isinstance(m, nn.Linear)], note):
        model(idx)
    return peaks


class RoundedInputLinear(nn.Module):
    """A Linear with weights and inputs in eight bits, for its error: it is as slow as before.

    Without `peaks` (K,) the input's scale is found anew for each token (dynamic). With them it
    is one number, fixed (static), and what lies beyond is clipped. `power` lets the weights
    take over some of the input's outliers first.
    """

    weight: Tensor
    smoothing: Tensor
    most: Tensor | None

    def __init__(
        self, linear: nn.Linear, peaks: Tensor | None = None, power: float | None = None
    ):
        super().__init__()
        if power is not None and peaks is None:
            raise ValueError(
                "smoothing has to know the peaks of the input's channels; give them, too."
            )
        weight, s = linear.weight.detach().float(), linear.weight.new_ones(linear.in_features)
        if power is not None and peaks is not None:
            s = smooth([weight], peaks, power)
        most = None if peaks is None else (peaks / s).max().clamp(min=1e-12)
        self.register_buffer("weight", round_to_nearest(weight * s, INT8).dequantize())
        self.register_buffer("smoothing", s)
        self.register_buffer("most", most)
        self.bias = linear.bias
        self.to(linear.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.smoothing
        most = self.most
        if most is None:
            most = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        codes = (x * (127 / most)).round().clamp(-127, 127)
        return F.linear(codes * (most / 127), self.weight, self.bias)
