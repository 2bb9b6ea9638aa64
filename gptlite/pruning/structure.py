"""Pruning whole parts: layers, heads, neurons and channels that matter least go.

What remains is a smaller dense GPT.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from gptlite.checkpoints import check_plain
from gptlite.model import GPT, Block, GPTConfig
from gptlite.pruning.importance import most_important


def greedy_layers(model: GPT, n: int, loss: Callable[[GPT], float]) -> Tensor:
    """The layers (n,) that stay if always that one goes without which the loss is least."""
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
    """A smaller dense copy with the chosen parts alone: what a mask over all others computes.

    `layers` (L',) and `channels` (C',) are numbers of what stays; `heads` (L, H') and `neurons`
    (L, hidden') of what stays in each of the L layers, equally many in each. None keeps all.
    Without some channels a LayerNorm takes mean and variance over the others.
    """
    c = model.config
    check_plain(model)
    if c.kv_heads != c.n_head and heads is not None:
        raise ValueError(
            f"heads that share {c.kv_heads} KV heads cannot be taken out one by one."
        )
    stay = _checked(None if layers is None else layers[None], "layers", 1, c.n_layer)[0]
    C = _checked(None if channels is None else channels[None], "channels", 1, c.n_embd)[0]
    heads_of = _checked(heads, "heads", c.n_layer, c.n_head)
    neurons_of = _checked(neurons, "neurons", c.n_layer, c.hidden)
    shape = {"n_head": heads_of.shape[1], "n_hidden": neurons_of.shape[1]}
    shape |= {"n_layer": len(stay), "n_embd": len(C), "head_size": c.head_dim}
    config = replace(c, **shape, n_kv_head=c.n_kv_head if heads is None else None)
    outside = {n: t for n, t in model.state_dict().items() if not n.startswith("h.")}
    tensors = {n: t[..., C] for n, t in outside.items()}
    for new, old in enumerate(stay.tolist()):
        kept = _rows_and_columns(c, heads_of[old], heads is None, neurons_of[old], C)
        for name, tensor in model.h[old].state_dict().items():
            # a LayerNorm has channels alone
            rows, columns = kept.get(name.rpartition(".")[0], (C, None))
            chosen = tensor[rows] if tensor.ndim == 1 else tensor[rows][:, columns]
            tensors[f"h.{new}.{name}"] = chosen
    attention = cast(Block, model.h[0]).attn.attention
    made = GPT(config, attention).to(model.wte.weight)
    made.load_state_dict(tensors)
    return made.train(model.training)


def _rows_and_columns(
    c: GPTConfig, heads: Tensor, all_heads: bool, neurons: Tensor, channels: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Which rows and columns stay of a block's matrices, by name, given its parts that stay."""
    answers = (heads[:, None] * c.head_dim + torch.arange(c.head_dim)).flatten()  # (H' D,)
    if all_heads:
        qkv = torch.arange((c.n_head + 2 * c.kv_heads) * c.head_dim)
    else:
        qkv = torch.cat([answers + part * c.n_head * c.head_dim for part in range(3)])
    return {
        "attn.c_attn": (qkv, channels),
        "attn.c_proj": (channels, answers),
        "mlp.c_fc": (neurons, channels),
        "mlp.c_proj": (channels, neurons),
    }


def _checked(numbers: Tensor | None, name: str, rows: int, most: int) -> Tensor:
    """Numbers of parts (rows, n), each once a row and in order; all of them for None."""
    if numbers is None:
        return torch.arange(most).expand(rows, most)
    if numbers.ndim != 2 or numbers.shape[0] != rows or numbers.shape[1] < 1:
        raise ValueError(
            f"{name} is {tuple(numbers.shape)}, but must have {rows} rows of numbers."
        )
    ordered = numbers.sort(dim=-1).values
    if ordered.min() < 0 or ordered.max() >= most or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError(f"{name} must be different numbers from 0 to {most - 1}.")
    return ordered
