"""A model's weights in few bits: every Linear swapped, what that did to it, and its file."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gptlite.checkpoints import (
    Checkpoint,
    load_weights,
    read_tensors,
    take_description,
    write_tensors,
)
from gptlite.corpus import CharTokenizer
from gptlite.model import GPT
from gptlite.quantization.fits import relative_error
from gptlite.quantization.grids import INT4, Grid, Quantized, round_to_nearest
from gptlite.quantization.linear import QuantizedEmbedding, QuantizedLinear


@dataclass(frozen=True)
class LayerReport:
    """What quantizing did to a Linear: bytes before and after, and its error, relative to what it was.

    With calibration the error is that of the layer's output, in root mean square; without, that of its weight.
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
    """Swap every Linear of a model, in place, for one of codes; the embedding shares the head's.

    `fit(weight, grid, gram)` finds the codes. With `calibration`, tokens (B, T), `gram` is X'X / n of the n rows X that
    the layer gets when all layers before it are quantized already; without, it is None.
    """
    if not isinstance(model.lm_head, nn.Linear):
        raise ValueError("the model is quantized already; begin with a copy of the original.")
    names, reports = {module: name for name, module in model.named_modules()}, []
    x = None if calibration is None else _embed(model, calibration)

    def swap(parent: nn.Module, name: str, run: Callable[[Tensor], Tensor]) -> None:
        linear = getattr(parent, name)
        gram = None if x is None else input_gram(linear, lambda: run(x))
        made = QuantizedLinear(linear, fit(linear.weight.float(), scheme, gram))
        setattr(parent, name, made)
        before = sum(p.nbytes for p in linear.parameters())
        error = relative_error(linear.weight.float(), made.weight, gram)
        reports.append(
            LayerReport(names[linear], tuple(linear.weight.shape), before, made.nbytes, error)
        )

    for block in model.h:
        attn, mlp = block.attn, block.mlp
        for parent, name in (
            (attn, "c_attn"),
            (attn, "c_proj"),
            (mlp, "c_fc"),
            (mlp, "c_proj"),
        ):
            swap(parent, name, block)
        x = None if x is None else block(x)
    dtype = model.wte.weight.dtype
    swap(model, "lm_head", lambda x: model.lm_head(model.ln_f(x)))
    model.wte = QuantizedEmbedding(model.lm_head, dtype)
    return reports


def _embed(model: GPT, idx: Tensor) -> Tensor:
    return model.wte(idx) + model.wpe(torch.arange(idx.shape[1], device=idx.device))


def input_gram(linear: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """X'X / n (K, K), in float32, of the n rows X that a Linear gets while `run` runs."""
    seen = []
    handle = linear.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2).float())
    )
    try:
        run()
    finally:
        handle.remove()
    return seen[0].T @ seen[0] / len(seen[0])


def save_quantized(
    path: Path, model: GPT, tokenizer: CharTokenizer, info: dict[str, Any]
) -> None:
    """Write a quantized model as it is, codes and scales and the rest, to one safetensors file of that size."""
    if not isinstance(model.lm_head, QuantizedLinear):
        raise ValueError(
            "the model is not quantized; call quantize_model first, or write it with checkpoints.save."
        )
    described = {**info, "config": asdict(model.config), "characters": tokenizer.characters}
    write_tensors(path, model.state_dict(), described)


def load_quantized(path: Path | str) -> Checkpoint:
    """The model that `save_quantized` wrote, bit for bit, with its tokenizer and info."""
    tensors, info = read_tensors(Path(path))
    model, tokenizer = take_description(info, path)
    dtype = tensors["ln_f.weight"].dtype if "ln_f.weight" in tensors else torch.float32
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    for name, linear in linears.items():
        parts = {
            part: tensors.get(f"{name}.{part}")
            for part in ("codes", "scale", "middle", "input_scale")
        }
        for part in ("codes", "scale"):
            if parts[part] is None:
                raise ValueError(
                    f"{path} is not a whole quantized model: it has no {name}.{part}."
                )
        parent, _, child = name.rpartition(".")
        try:
            made = QuantizedLinear.from_parts(linear, **parts)
        except ValueError as error:
            raise ValueError(f"{path} is of another architecture: of {name}, {error}") from None
        setattr(model.get_submodule(parent), child, made)
    model.wte = QuantizedEmbedding(model.lm_head, dtype)
    load_weights(model.to(dtype), tensors, path)
    return Checkpoint(model, tokenizer, info)
