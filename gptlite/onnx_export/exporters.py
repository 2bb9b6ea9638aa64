"""ONNX export: a model captured as one graph, in a file that needs no Python to run (https://onnx.ai)."""

import copy
import inspect
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import onnx

OPSET = 23  # the first with attention as one operator; ONNX Runtime knows it from 1.23 on, in the browser too


class TwoHeadBlock(nn.Module):
    """x + attention(LayerNorm(x)) with two heads, each with its own three Linears: small enough to draw in full.

    Typed and written so that `torch.jit.script`, which knows less Python than the model uses,
    takes it, too.
    """

    def __init__(self, n_embd: int = 64, block_size: int = 32, dropout: float = 0.2):
        super().__init__()
        D = n_embd // 2
        self.ln = nn.LayerNorm(n_embd)
        self.query = nn.ModuleList(nn.Linear(n_embd, D) for _ in range(2))
        self.key = nn.ModuleList(nn.Linear(n_embd, D) for _ in range(2))
        self.value = nn.ModuleList(nn.Linear(n_embd, D) for _ in range(2))
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer(
            "past_only", torch.ones(block_size, block_size, dtype=torch.bool).tril()
        )

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        h = self.ln(x)  # (B, T, C)
        heads = []
        for query, key, value in zip(self.query, self.key, self.value):  # noqa: B905 (`strict` is unknown to TorchScript)
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
    """The ONNX graph of a module, captured by `torch.export` from `args`, with no dynamic size under 2.

    `dynamic` names the dimensions that vary: {"idx": {0: "B", 1: "T"}}. `training` exports what
    the module does in training, dropout included; its mode is put back afterwards. `options` go
    to `torch.onnx.export`.
    """
    _needs("onnxscript")
    if opset < 18:
        raise ValueError(
            f"opset is {opset}, but torch.export's graphs are written in opset 18 or newer."
        )
    shapes = tuple(dict((dynamic or {}).get(name, {})) for name in inputs)
    for name, tensor, sizes in zip(inputs, args, shapes, strict=True):
        for i, letter in sizes.items():
            if (size := tensor.shape[i]) < 2:
                found = f"{name} is given with {letter} = {size}"
                raise ValueError(
                    f"{found}, which torch.export takes for a constant; give 2 or more."
                )
    kinds = [
        parameter.kind for parameter in inspect.signature(module.forward).parameters.values()
    ]
    if (
        inspect.Parameter.VAR_POSITIONAL in kinds
    ):  # as in forward(idx, *past), or in any compiled module
        first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        shapes = (*shapes[:first], shapes[first:])  # `*past` is one argument, a tuple
    with _mode(module, training), _quiet():
        program = torch.onnx.export(
            module,
            tuple(args),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            optimize=optimize,
            opset_version=opset,
            verbose=False,
            **options,
        )
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
    """The graph as the older exporter makes it, from a module, a `torch.jit.trace` or a `torch.jit.script` of one.

    The module's mode is left as it is, since this exporter has an opinion of its own
    (`training` in `options`).
    """
    _needs("onnx")
    import onnx

    file = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            module,
            tuple(args),
            file,
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
    idx = torch.zeros(2, 3, dtype=torch.long)
    model = copy.deepcopy(model).set_attention(masked_attention)
    return export(model, [idx], ["idx"], ["logits"], {"idx": {0: "B", 1: "T"}}, **options)


def export_cached(
    model: GPT, form: type[CachedGPT] = AppendingGPT, by_layer: bool = False, **options: Any
) -> "onnx.ModelProto":
    """One step with a cache: idx (B, T), past -> logits, and `present` or `new` as `form` says, for any B, T and P."""
    module, config = form(model, by_layer), model.config
    args = [torch.zeros(2, 3, dtype=torch.long), *empty_past(config, 2, 5, by_layer)]
    past = cache_names(config, "past", by_layer)
    returned = cache_names(config, form.returns, by_layer)
    dynamic = {"idx": {0: "B", 1: "T"}} | dict.fromkeys(
        past, {0: "B", 2: "P"} if by_layer else {1: "B", 3: "P"}
    )
    return export(module, args, ["idx", *past], ["logits", *returned], dynamic, **options)


def _without_paths(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The model without the exporter's notes on the lines of code, which name folders of this machine."""
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    return model


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module in training or evaluation mode, and afterwards each part in the mode it was in."""
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on deprecations and on packages that nobody asked for."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _needs(package: str) -> None:
    """A sentence on what to install, if it is not there."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ImportError(
            f"{package} is not installed, but this export needs it: pip install onnx onnxscript"
        )
