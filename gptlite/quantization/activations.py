"""Inputs in eight bits, too: rounded with a scale found anew for each token, or with one fixed beforehand."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT
from gptlite.quantization.fits import smooth
from gptlite.quantization.grids import INT8, round_to_nearest


@torch.no_grad()
def input_peaks(model: GPT, idx: Tensor) -> dict[nn.Module, Tensor]:
    """The largest size (K,) of each input channel of every Linear, while the model reads tokens idx (B, T)."""
    peaks, handles = {}, []
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:

        def note(linear: nn.Module, args: tuple[Tensor]) -> None:
            peaks[linear] = args[0].abs().flatten(0, -2).amax(0)

        handles.append(linear.register_forward_pre_hook(note))
    try:
        model(idx)
    finally:
        for handle in handles:
            handle.remove()
    return peaks


class RoundedInputLinear(nn.Module):
    """A Linear with weights and inputs in eight bits, computed in float32: for its error, not its speed.

    Without `peaks` (K,) the input's scale is found anew for each token (dynamic). With them it is one number, fixed
    (static), and what lies beyond is clipped. `power` lets the weights take over some of the input's outliers first.
    """

    def __init__(
        self, linear: nn.Linear, peaks: Tensor | None = None, power: float | None = None
    ):
        super().__init__()
        if power is not None and peaks is None:
            raise ValueError(
                "smoothing has to know the peaks of the input's channels; give them, too."
            )
        weight = linear.weight.detach().float()
        s = torch.ones(weight.shape[1]) if power is None else smooth([weight], peaks, power)
        self.weight = round_to_nearest(weight * s, INT8).dequantize()
        self.bias, self.smoothing = linear.bias, s
        self.most = None if peaks is None else (peaks / s).max().clamp(min=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.smoothing
        most = (
            x.abs().amax(-1, keepdim=True).clamp(min=1e-12) if self.most is None else self.most
        )
        codes = (x * (127 / most)).round().clamp(-127, 127)
        return F.linear(codes * (most / 127), self.weight, self.bias)
