"""ONNX export: a model captured as one graph that needs no Python to run (https://onnx.ai)."""

import copy
import inspect
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from gptlite.model import GPT
from gptlite.onnx_export.cache import (
    AppendingGPT,
    CachedGPT,
    cache_names,
    empty_past,
    masked_attention,
)
from gptlite.onnx_export.quiet import quiet

if TYPE_CHECKING:
    import onnx

# the first with attention as one operator; ONNX Runtime knows it from 1.23 on, in browsers too
OPSET = 23


class TwoHeadBlock(nn.Module):
    """x + attention(LayerNorm(x)) with two heads, each with its own three Linears: fit to draw.

    Typed and written so that `torch.jit.script`, which knows less Python than the model uses,
    takes it, too.
    """

    past_only: Tensor

    def __init__(self, n_embd: int = 64, block_size: int = 32, dropout: float = 0.2):
        super().__init__()
        D = n_embd // 2
        self.ln = nn.LayerNorm(n_embd)
        self.query = nn.ModuleList(nn.Linear(n_embd, D) for _ in range(2))
        self.key = nn.ModuleList(nn.Linear(n_embd, D) for _ in range(2))
        self.value = nn.ModuleList(nn.Linear(n_embd, D) for _ in range(2))
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)
        square = torch.ones(block_size, block_size, dtype=torch.bool)
        self.register_buffer("past_only", square.tril())

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        h = self.ln(x)  # (B, T, C)
        heads = []
        # `strict` is unknown to TorchScript
        for query, key, value in zip(self.query, self.key, self.value):  # noqa: B905
            q, k, v = query(h), key(h), value(h)  # (B, T, D)
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])  # (B, T, T)
            scores = scores.masked_fill(~self.past_only[:T, :T], -float("inf"))
            heads.append(self.dropout(scores.softmax(-1)) @ v)  # (B, T, D)
        return x + self.dropout(self.proj(torch.cat(heads, -1)))  # (B, T, C)


def export(
    module: nn.Module,
    args: Sequence[Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    training: bool = False,
    optimize: bool = True,
    opset: int = OPSET,
    **options: Any,
) -> "onnx.ModelProto":
    """The ONNX graph of a module, captured by `torch.export` from `args`.

    No size that varies may be under 2 there. `dynamic` names the dimensions that vary: {"idx":
    {0: "B", 1: "T"}}. `training` exports what the module does in training, dropout included;
    its mode is put back afterwards. `options` go to `torch.onnx.export`.
    """
    _needs("onnxscript")
    if opset < 18:
        oldest = "torch.export's graphs are written in opset 18 or newer"
        raise ValueError(f"opset is {opset}, but {oldest}.")
    sizes = [dict((dynamic or {}).get(name, {})) for name in inputs]
    for name, tensor, letters in zip(inputs, args, sizes, strict=True):
        for i, letter in letters.items():
            if (size := tensor.shape[i]) < 2:
                constant = "which torch.export takes for a constant; give 2 or more"
                raise ValueError(f"{name} is given with {letter} = {size}, {constant}.")
    shapes: list[Any] = [*sizes]
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    # as in forward(idx, *past), or in any compiled module: `*past` is one argument, a tuple
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        shapes[first:] = [tuple(sizes[first:])]
    with _mode(module, training), quiet():
        program = torch.onnx.export(
            module,
            tuple(args),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(shapes),
            optimize=optimize,
            opset_version=opset,
            verbose=False,
            **options,
        )
    assert program is not None  # as `dynamo` says
    return _without_paths(program.model_proto)


def export_torchscript(
    module: nn.Module,
    args: Sequence[Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    opset: int = 17,
    **options: Any,
) -> "onnx.ModelProto":
    """The graph as the older exporter makes it, from a module or what `torch.jit` made of one.

    The module's mode is left as it is, since this exporter has an opinion of its own
    (`training` in `options`).
    """
    _needs("onnx")
    import onnx

    file = io.BytesIO()
    with quiet():
        torch.onnx.export(
            module,
            tuple(args),
            cast(Any, file),  # a path, PyTorch's annotation says
            dynamo=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(sizes) for name, sizes in (dynamic or {}).items()},
            opset_version=opset,
            **options,
        )
    return onnx.load_from_string(file.getvalue())


def export_gpt(model: GPT, **options: Any) -> "onnx.ModelProto":
    """logits (B, T, V) of idx (B, T), for any B and T up to block_size."""
    _check_float32(model)
    idx = torch.zeros(2, 3, dtype=torch.long)
    model = copy.deepcopy(model).set_attention(masked_attention)
    return export(model, [idx], ["idx"], ["logits"], {"idx": {0: "B", 1: "T"}}, **options)


def export_cached(
    model: GPT, form: type[CachedGPT] = AppendingGPT, by_layer: bool = False, **options: Any
) -> "onnx.ModelProto":
    """One step with a cache, for any B, T and P: idx (B, T), past -> logits, and more.

    As `form` a `CachedGPT` returns `present` as well, an `AppendingGPT` `new`.
    """
    _check_float32(model)
    module, config = form(model, by_layer), model.config
    args = [torch.zeros(2, 3, dtype=torch.long), *empty_past(config, 2, 5, by_layer)]
    past = cache_names(config, "past", by_layer)
    returned = cache_names(config, form.returns, by_layer)
    sizes = {0: "B", 2: "P"} if by_layer else {1: "B", 3: "P"}
    dynamic = {"idx": {0: "B", 1: "T"}} | dict.fromkeys(past, sizes)
    return export(module, args, ["idx", *past], ["logits", *returned], dynamic, **options)


def _check_float32(model: GPT) -> None:
    """Refuse what ONNX Runtime's operators, the caches here and NumPy do not have alike."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and (p.dtype, p.device.type) != (torch.float32, "cpu"):
            remedy = "export model.float().cpu(), and store_half halves the file"
            raise ValueError(f"{name} is {p.dtype} on {p.device.type}; {remedy}.")


def _without_paths(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The model without notes on lines of code, which name folders of this machine."""
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    return model


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module in training or evaluation mode; afterwards each part is in its own again."""
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def _needs(package: str) -> None:
    """A sentence on what to install, if it is not there."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        remedy = "pip install onnx onnxscript"
        raise ImportError(f"{package} is not installed, but this export needs it: {remedy}")
