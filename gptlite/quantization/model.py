"""A model's weights in few bits: every Linear swapped, and what that did to it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from gptlite.model import GPT, check_tied, watch
from gptlite.quantization.fits import relative_error
from gptlite.quantization.grids import INT4, Grid, Quantized, round_to_nearest
from gptlite.quantization.linear import QuantizedEmbedding, QuantizedLinear

PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block, as it runs


@dataclass(frozen=True)
class LayerReport:
    """A Linear's bytes before and after it was quantized, and its error in shares of it.

    With calibration the error is that of the layer's output, in root mean square; without, that
    of its weight.
    """

    name: str
    shape: tuple[int, int]
    before: int
    after: int
    error: float


Fit = Callable[[Tensor, Grid, Tensor | None], Quantized]


@torch.no_grad()
def quantize_model(
    model: GPT,
    scheme: Grid = INT4,
    fit: Fit = round_to_nearest,
    calibration: Tensor | None = None,
) -> list[LayerReport]:
    """Swap every Linear of a model, in place, for one of codes, which head and embedding share.

    `fit(weight, grid, gram)` finds the codes. With `calibration`, tokens (B, T), `gram` is
    X'X / n of the n rows X that the layer gets when all before it are quantized already;
    without, it is None. What fails or is interrupted leaves the model as it was.
    """
    linears, reports = _linears(model), list[LayerReport]()
    x = None if calibration is None else _embed(model, calibration)

    def swap(name: str, run: Callable[[Tensor], Tensor]) -> QuantizedLinear:
        linear = linears[name]
        gram = None if x is None else input_gram(linear, run, x)
        made = QuantizedLinear(linear, fit(linear.weight.float(), scheme, gram))
        model.set_submodule(name, made)
        before = sum(p.nbytes for p in linear.parameters())
        shape = linear.out_features, linear.in_features
        error = relative_error(linear.weight.float(), made.weight, gram)
        reports.append(LayerReport(name, shape, before, made.nbytes, error))
        return made

    try:
        for i, block in enumerate(model.h):
            for part in PARTS:
                swap(f"h.{i}.{part}", block)
            x = None if x is None else block(x)
        head = swap("lm_head", lambda x: model.lm_head(model.ln_f(x)))
        model.set_submodule("wte", QuantizedEmbedding(head, model.wte.weight.dtype))
    except BaseException:  # an impatient reader's, too
        for name, linear in linears.items():
            model.set_submodule(name, linear)
        raise
    return reports


def _linears(model: GPT) -> dict[str, nn.Linear]:
    """The Linears by name; a ValueError names the first place that holds something else."""
    check_tied(model)
    names = [f"h.{i}.{part}" for i in range(len(model.h)) for part in PARTS]
    found = {}
    for name in [*names, "lm_head"]:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{name} is a {type(module).__name__} already, but must be a Linear; "
                "begin with a copy of the original."
            )
        found[name] = module
    return found


def _embed(model: GPT, idx: Tensor) -> Tensor:
    return model.wte(idx) + model.wpe(torch.arange(idx.shape[1], device=idx.device))


def input_gram(linear: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """X'X / n (K, K), in float32, of the n rows X that a Linear gets while `run(x)` runs."""
    seen: list[Tensor] = []
    with watch([linear], lambda _, inputs, y: seen.append(inputs[0].flatten(0, -2).float())):
        run(x)
    return seen[0].T @ seen[0] / len(seen[0])
