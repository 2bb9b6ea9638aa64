"""Pruning whole parts: layers, heads, neurons and channels that matter least go, and a smaller dense GPT remains."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT, GPTConfig


@dataclass(frozen=True)
class Importance:
    """How much each part matters: layers (L,), heads (L, H), neurons of the MLPs (L, hidden), channels (C,)."""

    layers: Tensor
    heads: Tensor
    neurons: Tensor
    channels: Tensor


@contextmanager
def _gates(
    model: GPT, layers: Callable, heads: Callable, neurons: Callable, channels: Callable
) -> Iterator[None]:
    """While it lasts, block i asks heads(i, a) and neurons(i, a) about what its projections get, (B, T, H D) and
    (B, T, hidden), and layers(i, x, y) about what goes in and comes out; channels(y) is asked about all that is read
    of the residual stream, (B, T, C). An answer that is not None replaces it.
    """
    handles = [model.ln_f.register_forward_hook(lambda _, args, y: channels(y))]
    for i, block in enumerate(model.h):
        handles += [
            block.attn.c_proj.register_forward_pre_hook(lambda _, args, i=i: heads(i, args[0])),
            block.mlp.c_proj.register_forward_pre_hook(
                lambda _, args, i=i: neurons(i, args[0])
            ),
            block.register_forward_hook(lambda _, args, y, i=i: layers(i, args[0], y)),
            *(
                ln.register_forward_hook(lambda _, args, y: channels(y))
                for ln in (block.ln_1, block.ln_2)
            ),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activation_importance(model: GPT, batches: Sequence[Tensor]) -> Importance:
    """Mean size of each head's answer, neuron's activation and normalised channel over batches of tokens (B, T); for a
    layer how far it turns the residual stream, 1 - cosine of what goes in and comes out (Men et al., 2024).
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
    """Mean size, over batches x, y (B, T), of the loss's slope in a factor of one before each part's answer.

    The slopes' mean is about zero after training; their square goes with the curvature (see Michel et al., 2019).
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


def greedy_layers(model: GPT, n: int, loss: Callable[[GPT], float]) -> Tensor:
    """The numbers (n,) of the layers that stay if, one after another, that one goes without which the loss is least."""
    stay = torch.arange(model.config.n_layer)
    most_important(stay, n)  # refuses an n that is none
    while len(stay) > n:
        fewer = [torch.cat([stay[:i], stay[i + 1 :]]) for i in range(len(stay))]
        stay = min(fewer, key=lambda layers: loss(shrink(model, layers)))
    return stay


def shrink(
    model: GPT,
    layers: Tensor | None = None,
    heads: Tensor | None = None,
    neurons: Tensor | None = None,
    channels: Tensor | None = None,
) -> GPT:
    """A smaller dense copy of a model with the chosen parts alone: what a mask over all others would compute.

    `layers` (L',) and `channels` (C',) are numbers of what stays; `heads` (L, H') and `neurons` (L, hidden') of what
    stays in each of the L layers, equally many in each. None keeps all. Without some channels a LayerNorm takes mean
    and variance over the others.
    """
    c = model.config
    if c.kv_heads != c.n_head and heads is not None:
        raise ValueError(
            f"heads that share {c.kv_heads} KV heads cannot be taken out one by one."
        )
    stay = _checked(None if layers is None else layers[None], "layers", 1, c.n_layer)[0]
    C = _checked(None if channels is None else channels[None], "channels", 1, c.n_embd)[0]
    heads_of = _checked(heads, "heads", c.n_layer, c.n_head)
    neurons_of = _checked(neurons, "neurons", c.n_layer, c.hidden)
    shape = {
        "n_layer": len(stay),
        "n_embd": len(C),
        "n_head": heads_of.shape[1],
        "n_hidden": neurons_of.shape[1],
    }
    n_kv_head = c.n_kv_head if heads is None else None
    config = replace(c, **shape, n_kv_head=n_kv_head, head_size=c.head_dim)
    tensors = {
        n: t[C] if t.ndim == 1 else t[:, C]
        for n, t in model.state_dict().items()
        if not n.startswith("h.")
    }
    for new, old in enumerate(stay.tolist()):
        block, hidden = model.h[old].state_dict(), neurons_of[old]
        answers = (
            heads_of[old][:, None] * c.head_dim + torch.arange(c.head_dim)
        ).flatten()  # (H' D,)
        qkv = torch.arange(len(block["attn.c_attn.bias"]))
        if heads is not None:
            qkv = torch.cat([answers + part * c.n_head * c.head_dim for part in range(3)])
        kept = {"attn.c_attn": (qkv, C), "attn.c_proj": (C, answers)}
        kept |= {"mlp.c_fc": (hidden, C), "mlp.c_proj": (C, hidden)}
        for name, tensor in block.items():
            rows, columns = kept.get(
                name.rpartition(".")[0], (C, None)
            )  # a LayerNorm has channels alone
            tensors[f"h.{new}.{name}"] = (
                tensor[rows] if tensor.ndim == 1 else tensor[rows][:, columns]
            )
    made = GPT(config, model.h[0].attn.attention).to(model.wte.weight)
    made.load_state_dict(tensors)
    return made.train(model.training)


def _checked(numbers: Tensor | None, name: str, rows: int, most: int) -> Tensor:
    """Numbers of parts (rows, n), each once a row and in order; all of them for None."""
    if numbers is None:
        return torch.arange(most).expand(rows, most)
    if numbers.ndim != 2 or numbers.shape[0] != rows or numbers.shape[1] < 1:
        raise ValueError(
            f"{name} is {tuple(numbers.shape)}, but must have {rows} rows of at least one number."
        )
    ordered = numbers.sort(dim=-1).values
    if ordered.min() < 0 or ordered.max() >= most or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError(f"{name} must be different numbers from 0 to {most - 1}.")
    return ordered


def most_important(scores: Tensor, n: int) -> Tensor:
    """The numbers (..., n) of the n highest scores (..., all), in order."""
    if not 1 <= n <= scores.shape[-1]:
        raise ValueError(
            f"{n} parts are to stay, but there are {scores.shape[-1]}, of which at least one must."
        )
    return scores.topk(n, dim=-1).indices.sort(dim=-1).values


def scaled_config(config: GPTConfig, scale: float) -> GPTConfig:
    """A config with about `scale` times the layers, heads and channels, each rounded so that heads divide the channels.

    The context stays, so that a teacher's labels fit. KV heads are the most, up to as many, that divide the heads.
    """
    n_layer, n_head = round(config.n_layer * scale), round(config.n_head * scale)
    if not 0 < scale <= 1 or n_layer < 1 or n_head < 1:
        raise ValueError(
            f"a scale of {scale} leaves {n_layer} layers and {n_head} heads; at least one of each must stay."
        )
    n_embd = n_head * max(1, round(config.n_embd * scale / n_head))
    n_kv_head = config.n_kv_head and max(
        k for k in range(1, config.n_kv_head + 1) if n_head % k == 0
    )
    n_hidden = config.n_hidden and max(1, round(config.n_hidden * scale))
    shape = {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "n_kv_head": n_kv_head,
        "n_hidden": n_hidden,
    }
    return replace(config, **shape, head_size=None)
