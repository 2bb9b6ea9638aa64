"""Files of quantized models: codes and scales as they are, and so of the size of their bits."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gptlite.checkpoints import Checkpoint, load_weights, take_description
from gptlite.corpus import CharTokenizer
from gptlite.model import GPT
from gptlite.quantization.grids import Quantized
from gptlite.quantization.linear import SIDE, QuantizedEmbedding, QuantizedLinear, unpack
from gptlite.tensor_files import read_tensors, write_tensors


def save_quantized(
    path: Path, model: GPT, tokenizer: CharTokenizer, info: dict[str, Any]
) -> None:
    """Write a quantized model as it is to a file that `load_quantized` reads again.

    A ValueError names what it would not: every Linear must be one of codes, while the embedding
    may be one of numbers, as after `swap_linears(Int4Linear)`.
    """
    _check_quantized(model)
    described = {**info, "config": asdict(model.config), "characters": tokenizer.characters}
    write_tensors(path, model.state_dict(), described)


def _check_quantized(model: GPT) -> None:
    """A ValueError unless a model is what `load_quantized` makes of its config and tensors."""
    with torch.device("meta"):
        made = GPT(model.config)
    found = dict(model.named_modules())
    for name, linear in list(made.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        there = found.get(name)
        if not isinstance(there, QuantizedLinear):
            raise ValueError(
                f"the model is not quantized: {name} is a {type(there).__name__}, not a "
                "QuantizedLinear; call quantize_model, or write it with checkpoints.save."
            )
        have, want = ((m.out_features, m.in_features) for m in (there, linear))
        if have != want:
            raise ValueError(f"{name} is {have}, but by the model's config must be {want}.")
        made.set_submodule(name, there)
    if isinstance(model.wte, QuantizedEmbedding) and model.wte.head is model.lm_head:
        made.set_submodule("wte", model.wte)
    mine, theirs = ({n: t.shape for n, t in m.state_dict().items()} for m in (model, made))
    wrong = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if wrong:
        raise ValueError(
            f"the model is not as its config says: {wrong[0]} is {mine.get(wrong[0])}, "
            f"but must be {theirs.get(wrong[0])}."
        )
    formats = {t.dtype for t in model.parameters()}
    if len(formats) > 1:
        raise ValueError(
            f"the model's parts are in {' and '.join(sorted(map(str, formats)))}; "
            "bring them to one format with model.to(...) first."
        )


def load_quantized(path: Path | str) -> Checkpoint:
    """The model that `save_quantized` wrote, bit for bit, with its tokenizer and info."""
    tensors, info = read_tensors(Path(path))
    model, tokenizer = take_description(info, path)
    dtype = tensors["ln_f.weight"].dtype if "ln_f.weight" in tensors else torch.float32

    def read(linear: nn.Linear) -> QuantizedLinear:
        return _read_linear(linear, names[linear], tensors, path)

    names = {module: name for name, module in model.named_modules()}
    model.swap_linears(read)
    if "wte.weight" not in tensors:
        head = model.get_submodule("lm_head")
        assert isinstance(head, QuantizedLinear)
        model.set_submodule("wte", QuantizedEmbedding(head, dtype))
    load_weights(model.to(dtype), tensors, path)
    return Checkpoint(model, tokenizer, info)


def _read_linear(
    linear: nn.Linear, name: str, tensors: dict[str, Tensor], path: Path | str
) -> QuantizedLinear:
    """A Linear of the codes that a file has by a name; a ValueError says what does not fit."""
    for part in ("codes", "scale"):
        if f"{name}.{part}" not in tensors:
            raise ValueError(f"{path} is not a whole quantized model: it has no {name}.{part}.")
    codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
    middle, input_scale = (tensors.get(f"{name}.{part}") for part in ("middle", "input_scale"))
    try:
        return linear_of_parts(linear, codes, scale, middle, input_scale)
    except ValueError as error:
        raise ValueError(f"{path} is of another architecture: of {name}, {error}") from None


def linear_of_parts(
    linear: nn.Linear,
    codes: Tensor,
    scale: Tensor,
    middle: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> QuantizedLinear:
    """A Linear of codes in the place of `linear`, with tensors as another one had them."""
    N, K = linear.out_features, linear.in_features
    sides, groups = -(-N // SIDE), scale.shape[1] if scale.ndim == 3 else 0
    packed: dict[tuple[int, ...], int] = {
        (sides, K * bits // 32, 4 * SIDE): bits for bits in (4, 8)
    }
    bits = packed.get(tuple(codes.shape))
    if bits is None or groups < 1 or K % groups or scale.shape != (sides, groups, SIDE):
        raise ValueError(
            f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} are not those of "
            f"{N} rows of {K} weights in four or eight bits."
        )
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}, but must be torch.uint8.")
    if middle is not None and middle.shape != scale.shape:
        raise ValueError(
            f"the middle is {tuple(middle.shape)}, but must be {tuple(scale.shape)}."
        )
    if input_scale is not None and input_scale.shape != (K,):
        raise ValueError(f"the input_scale is {tuple(input_scale.shape)}, but must be {(K,)}.")
    rows = torch.arange(N, device=codes.device)
    at = rows // SIDE, slice(None), rows % SIDE
    by_row = None if middle is None else middle[at]
    found = Quantized(unpack(codes, bits, rows), scale[at], bits, by_row, input_scale)
    return QuantizedLinear(linear, found)
