"""How much each layer, head, neuron and channel of a model matters, by two measures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gptlite.model import GPT, Block, GPTConfig, watch


@dataclass(frozen=True)
class Importance:
    """How much each layer (L,), head (L, H), neuron (L, hidden) and channel (C,) matters."""

    layers: Tensor
    heads: Tensor
    neurons: Tensor
    channels: Tensor


@contextmanager
def _gates(
    model: GPT, layers: Callable, heads: Callable, neurons: Callable, channels: Callable
) -> Iterator[None]:
    """While it lasts, the parts' answers pass through functions, which may replace them.

    Block i asks heads(i, a) and neurons(i, a) about what its projections get, (B, T, H D) and
    (B, T, hidden), and layers(i, x, y) about what goes in and comes out; channels(y) is asked
    about all that is read of the residual stream, (B, T, C). None replaces nothing.
    """
    blocks = cast("Sequence[Block]", model.h)

    def before(module: nn.Module, ask: Callable) -> RemovableHandle:
        return module.register_forward_pre_hook(lambda _, args: ask(args[0]))

    def after(module: nn.Module, ask: Callable) -> AbstractContextManager[None]:
        return watch([module], lambda _, args, y: ask(args[0], y))

    with ExitStack() as gates:
        for i, block in enumerate(blocks):
            gates.enter_context(after(block, partial(layers, i)))
            gates.enter_context(before(block.attn.c_proj, partial(heads, i)))
            gates.enter_context(before(block.mlp.c_proj, partial(neurons, i)))
        for norm in [model.ln_f, *(ln for block in blocks for ln in (block.ln_1, block.ln_2))]:
            gates.enter_context(after(norm, lambda _, y: channels(y)))
        yield


@torch.no_grad()
def activation_importance(model: GPT, batches: Sequence[Tensor]) -> Importance:
    """Mean size of heads' answers, neurons and normalised channels over batches x (B, T).

    For a layer it is how far it turns the residual stream: 1 - cosine of what goes in and comes
    out (Men et al., 2024).
    """
    c, found = model.config, [torch.zeros(shape) for shape in _shapes(model.config)]

    def layers(i: int, x: Tensor, y: Tensor) -> None:
        found[0][i] += 1 - F.cosine_similarity(x, y, dim=-1).mean().cpu()

    def heads(i: int, a: Tensor) -> None:
        found[1][i] += a.unflatten(-1, (c.n_head, c.head_dim)).norm(dim=-1).mean((0, 1)).cpu()

    def neurons(i: int, a: Tensor) -> None:
        found[2][i] += a.abs().mean((0, 1)).cpu()

    def channels(y: Tensor) -> None:
        found[3].add_(y.abs().mean((0, 1)).cpu())

    with _gates(model, layers, heads, neurons, channels):
        for x in batches:
            model(x)
    return Importance(*(total / len(batches) for total in found))


def gradient_importance(model: GPT, batches: Sequence[tuple[Tensor, Tensor]]) -> Importance:
    """Mean size, over batches x, y (B, T), of the loss's slope in a factor of one at each part.

    The factor stands before the part's answer. The slopes' mean is about zero after training;
    their square goes with the curvature (see Michel et al., 2019).
    """
    c, device = model.config, next(model.parameters()).device
    ones = [torch.ones(shape, device=device, requires_grad=True) for shape in _shapes(c)]
    found = [torch.zeros_like(g) for g in ones]

    def layers(i: int, x: Tensor, y: Tensor) -> Tensor:
        return x + ones[0][i] * (y - x)

    def heads(i: int, a: Tensor) -> Tensor:
        return a * ones[1][i].repeat_interleave(c.head_dim)

    def neurons(i: int, a: Tensor) -> Tensor:
        return a * ones[2][i]

    def channels(y: Tensor) -> Tensor:
        return y * ones[3]

    with torch.enable_grad(), _gates(model, layers, heads, neurons, channels):
        for x, y in batches:
            loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
            for total, slope in zip(found, torch.autograd.grad(loss, ones), strict=True):
                total += slope.abs() / len(batches)
    return Importance(*(t.cpu() for t in found))


def _shapes(c: GPTConfig) -> list[tuple[int, ...]]:
    return [(c.n_layer,), (c.n_layer, c.n_head), (c.n_layer, c.hidden), (c.n_embd,)]


def most_important(scores: Tensor, n: int) -> Tensor:
    """The numbers (..., n) of the n highest scores (..., all), in order."""
    if not 1 <= n <= scores.shape[-1]:
        raise ValueError(
            f"{n} parts are to stay, but there are {scores.shape[-1]}, of which one must."
        )
    return scores.topk(n, dim=-1).indices.sort(dim=-1).values
