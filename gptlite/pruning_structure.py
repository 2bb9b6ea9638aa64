"""Pruning whole parts: heads, neurons and layers that matter least are taken out, and a smaller dense GPT remains."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT, GPTConfig


@dataclass(frozen=True)
class Importance:
    """How much each part matters: heads (L, H), neurons of the MLPs (L, hidden), layers (L,)."""

    heads: Tensor
    neurons: Tensor
    layers: Tensor


@contextmanager
def _gates(model: GPT, heads: Callable, neurons: Callable, layers: Callable) -> Iterator[None]:
    """While it lasts, block i asks heads(i, a) and neurons(i, a) about what its projections get, (B, T, H D) and
    (B, T, hidden), and layers(i, x, y) about what goes in and comes out; an answer that is not None replaces it.
    """
    handles = []
    for i, block in enumerate(model.h):
        handles += [
            block.attn.c_proj.register_forward_pre_hook(lambda _, args, i=i: heads(i, args[0])),
            block.mlp.c_proj.register_forward_pre_hook(lambda _, args, i=i: neurons(i, args[0])),
            block.register_forward_hook(lambda _, args, y, i=i: layers(i, args[0], y)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activation_importance(model: GPT, batches: Sequence[Tensor]) -> Importance:
    """Mean size of each head's answer and each neuron's activation over batches of tokens (B, T); for a layer how far
    it turns the residual stream, 1 - cosine of what goes in and comes out (Men et al., 2024).
    """
    c, found = model.config, [torch.zeros(model.config.n_layer, n) for n in _counts(model.config)]

    def heads(i: int, a: Tensor) -> None:
        found[0][i] += a.unflatten(-1, (c.n_head, c.head_dim)).norm(dim=-1).mean((0, 1)).cpu()

    def neurons(i: int, a: Tensor) -> None:
        found[1][i] += a.abs().mean((0, 1)).cpu()

    def layers(i: int, x: Tensor, y: Tensor) -> None:
        found[2][i] += 1 - F.cosine_similarity(x, y, dim=-1).mean().cpu()

    with _gates(model, heads, neurons, layers):
        for x in batches:
            model(x)
    return Importance(found[0] / len(batches), found[1] / len(batches), found[2][:, 0] / len(batches))


def gradient_importance(model: GPT, batches: Sequence[tuple[Tensor, Tensor]]) -> Importance:
    """How much the loss of batches x, y (B, T) would change, to first order, if a part's answer were zero.

    It is the gradient with respect to a factor of one before the answer (Michel et al., 2019), its size averaged.
    """
    c, device = model.config, next(model.parameters()).device
    ones = [torch.ones(c.n_layer, n, device=device, requires_grad=True) for n in _counts(c)]
    found = [torch.zeros_like(g) for g in ones]

    def heads(i: int, a: Tensor) -> Tensor:
        return a * ones[0][i].repeat_interleave(c.head_dim)

    def neurons(i: int, a: Tensor) -> Tensor:
        return a * ones[1][i]

    def layers(i: int, x: Tensor, y: Tensor) -> Tensor:
        return x + ones[2][i] * (y - x)

    with torch.enable_grad(), _gates(model, heads, neurons, layers):
        for x, y in batches:
            loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
            for total, gradient in zip(found, torch.autograd.grad(loss, ones), strict=True):
                total += gradient.abs() / len(batches)
    return Importance(*(t.cpu() for t in (found[0], found[1], found[2][:, 0])))


def _counts(c: GPTConfig) -> tuple[int, int, int]:
    return c.n_head, c.hidden, 1


def shrink(model: GPT, layers: Tensor | None = None, heads: Tensor | None = None, neurons: Tensor | None = None) -> GPT:
    """A smaller dense copy of a model with the chosen parts alone: what a mask over all others would compute.

    `layers` (L',) are numbers of layers; `heads` (L, H') and `neurons` (L, hidden') are numbers of what stays in each
    of the L layers, equally many in each. None keeps all.
    """
    c = model.config
    if c.kv_heads != c.n_head and heads is not None:
        raise ValueError(f"heads that share {c.kv_heads} KV heads cannot be taken out one by one.")
    chosen = [
        _checked(layers[None] if layers is not None else None, "layers", 1, c.n_layer)[0],
        _checked(heads, "heads", c.n_layer, c.n_head),
        _checked(neurons, "neurons", c.n_layer, c.hidden),
    ]
    stay, H, hidden = chosen[0].tolist(), chosen[1].shape[1], chosen[2].shape[1]
    config = replace(
        c,
        n_layer=len(stay),
        n_head=H,
        n_kv_head=None if heads is not None else c.n_kv_head,
        head_size=c.head_dim,
        n_hidden=hidden,
    )
    made = GPT(config, model.h[0].attn.attention).to(model.wte.weight)
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("h.")}
    for new, old in enumerate(stay):
        block = dict(model.h[old].state_dict())
        if heads is not None:
            of_head = (chosen[1][old][:, None] * c.head_dim + torch.arange(c.head_dim)).flatten()  # (H' D,)
            qkv = torch.cat([of_head + part * c.n_head * c.head_dim for part in range(3)])
            block["attn.c_attn.weight"], block["attn.c_attn.bias"] = (
                block[f"attn.c_attn.{n}"][qkv] for n in ("weight", "bias")
            )
            block["attn.c_proj.weight"] = block["attn.c_proj.weight"][:, of_head]
        for name in ("mlp.c_fc.weight", "mlp.c_fc.bias"):
            block[name] = block[name][chosen[2][old]]
        block["mlp.c_proj.weight"] = block["mlp.c_proj.weight"][:, chosen[2][old]]
        tensors |= {f"h.{new}.{n}": t for n, t in block.items()}
    made.load_state_dict(tensors)
    return made.train(model.training)


def _checked(numbers: Tensor | None, name: str, rows: int, most: int) -> Tensor:
    """Numbers of parts (rows, n), each once a row and in order; all of them for None."""
    if numbers is None:
        return torch.arange(most).expand(rows, most)
    if numbers.ndim != 2 or numbers.shape[0] != rows or numbers.shape[1] < 1:
        raise ValueError(f"{name} is {tuple(numbers.shape)}, but must have {rows} rows of at least one number.")
    ordered = numbers.sort(dim=-1).values
    if ordered.min() < 0 or ordered.max() >= most or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError(f"{name} must be different numbers from 0 to {most - 1}.")
    return ordered


def most_important(scores: Tensor, n: int) -> Tensor:
    """The numbers (..., n) of the n highest scores (..., all), in order."""
    if not 1 <= n <= scores.shape[-1]:
        raise ValueError(f"{n} parts are to stay, but there are {scores.shape[-1]}, of which at least one must.")
    return scores.topk(n, dim=-1).indices.sort(dim=-1).values


def scaled_config(config: GPTConfig, scale: float) -> GPTConfig:
    """A config with about `scale` times the layers, and times the heads, which keep their size: widths stay divisible.

    The context is the same, so that a teacher's labels fit.
    """
    n_layer, n_head = round(config.n_layer * scale), round(config.n_head * scale)
    if not 0 < scale <= 1 or n_layer < 1 or n_head < 1:
        raise ValueError(
            f"a scale of {scale} leaves {n_layer} layers and {n_head} heads; at least one of each must stay."
        )
    n_kv_head = None if config.n_kv_head is None else min(config.n_kv_head, n_head)
    return replace(config, n_layer=n_layer, n_head=n_head, n_embd=n_head * config.head_dim, n_kv_head=n_kv_head)
